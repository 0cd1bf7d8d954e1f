"""`python -m fintune`, and the command `fintune`."""

import signal


def main() -> None:
    """Run the command line. Ctrl-C while it is loaded ends at once and says nothing: no work has
    begun that could be continued."""
    loading = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if loading:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fintune import cli

    if loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
