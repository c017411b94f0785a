"""Former name of `benchmarks.jobs`, which results and scripts quote."""

from benchmarks.jobs.__main__ import main

if __name__ == "__main__":
    main()
