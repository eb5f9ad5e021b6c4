"""The command line."""

from lorakit.cli.app import app as app
from lorakit.cli.app import main as main
