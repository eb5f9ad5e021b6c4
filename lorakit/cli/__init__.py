"""The command line."""


def main() -> None:
    """Run the command. Ctrl-C ends it quietly, also while it is still importing."""
    try:
        from lorakit.cli.app import main as run

        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
