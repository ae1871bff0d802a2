"""`python -m lossops_bench`."""

from lossops_bench import main

if __name__ == "__main__":
    main()
