"""`python -m bdpo_pl COMMAND`, the same as `bdpo COMMAND`."""

from bdpo_pl.cli.main import main

main()
