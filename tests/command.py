"""The command line, as a script for processes of tests."""

from gradrank.cli.main import main

if __name__ == "__main__":
    main()
