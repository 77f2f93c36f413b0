"""What training needs beside the networks: moving averages, sharding, guarded steps."""
