"""Parts that are added from outside the packages, one file each, and the tests that use them."""
