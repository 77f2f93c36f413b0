"""``python -m maetok.analysis``; see :mod:`maetok.analysis.command`."""

from maetok.analysis.command import main

if __name__ == "__main__":
    main()
