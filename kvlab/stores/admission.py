"""Which objects are worth keeping: a rule of your own, by name.

A package adds one through the entry point group ``kvlab.admission``: name -> class, made without arguments.
"""

from kvlab.errors import ConfigError, among
from kvlab.installed import class_at, found, label, told

GROUP = "kvlab.admission"  # of entry points
RULES: dict[str, str] = {}  # name -> "module:Class", of this process alone


class AdmissionRule:
    """Decides, for each object of a prompt that is computed and not held, whether it is kept.

    It is asked in order of time, reads no clock and draws no random numbers, so that a simulation predicts what an
    engine does. The owner holds a lock.
    """

    def admit(self, key: object, end_token: int) -> bool:
        """Whether to keep the object `key` now.

        Parameters
        ----------
        key
            names the object's tokens and all before them; the same for every prompt that begins with them
        end_token
            of how many tokens that is
        """
        raise NotImplementedError


def get_rule(rule: str | type[AdmissionRule]) -> AdmissionRule:
    """A new rule by name, or of a class.

    Raises
    ------
    ConfigError
        for an unknown name, with the known ones named, and for a class that is no rule or cannot be made
    """
    given: object = rule  # from users
    if isinstance(given, str):
        target = RULES.get(given) or found(GROUP).get(given)
        if target is None:
            known = among(given, sorted({*RULES, *found(GROUP)}), none=f"none; packages offer them as {GROUP}")
            raise ConfigError(f"unknown admission rule {given!r}; {known}")
        cls, shown = class_at(GROUP, given, target), label(GROUP, given, target)
    else:
        cls, shown = given, "an admission rule"
    if not (isinstance(cls, type) and issubclass(cls, AdmissionRule)):
        raise ConfigError(f"{shown} must be a name or a class made from AdmissionRule, got {cls!r}"[:300])
    try:
        return cls()
    except Exception as error:
        raise ConfigError(f"{shown} must be made without arguments and raise nothing: {told(error)}") from error
