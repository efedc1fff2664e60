"""Argument parsers of the subcommands: a wrong argument never shows a login."""

import argparse
from typing import NoReturn

from kvlab.errors import ConfigError
from kvlab.stores.url import hide_logins


class Parser(argparse.ArgumentParser):
    """Shows no login that stands in a wrong place."""

    def error(self, message: str) -> NoReturn:  # which repeats what was typed
        super().error(hide_logins(message))


class OneLineParser(argparse.ArgumentParser):
    """Raises ConfigError, which the dispatcher turns into one line, as for every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")
