"""Which programs code a kind on the device where the pages lie."""

from kvlab.codecs.addresses import Addresses
from kvlab.codecs.centered import CenteredCodec
from kvlab.codecs.rotated import RotatedCodec
from kvlab.codecs.scaled import ScaledCodec
from kvlab.errors import ConfigError
from kvlab.serde.base import Serde
from kvlab.serde.centered import CenteredSerde
from kvlab.serde.quantized import ScaledSerde
from kvlab.serde.rotated import Rotated4Serde
from kvlab.stated import CODED_KINDS


def device_codec(serde: Serde, addresses: Addresses) -> ScaledCodec | RotatedCodec | CenteredCodec:
    """The programs of `serde`, whose blocks have one size. ConfigError where there are none."""
    if isinstance(serde, ScaledSerde):
        return ScaledCodec(serde, addresses)
    if isinstance(serde, Rotated4Serde):
        return RotatedCodec(serde, addresses)
    if isinstance(serde, CenteredSerde):
        return CenteredCodec(serde, addresses)
    raise ConfigError(f"no GPU program codes blocks as {serde.spec!r}; there are {', '.join(CODED_KINDS)}")
