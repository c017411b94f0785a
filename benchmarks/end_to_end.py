"""The name that `benchmarks.jobs` had before: results and scripts quote it."""

from benchmarks.jobs.__main__ import main

if __name__ == "__main__":
    main()
