"""A small trained video generator: the real Wan pipeline, for captions such as "a red circle moves left over stripes".

    from vecattention.testbed import generate

    pipe = generate.load()                                                # a diffusers WanPipeline
    films = generate.make(pipe, ["a red circle moves left over stripes"])  # uint8 [1, 13, 64, 64, 3]
    generate.look(films[0])                                               # Seen(colour='red', shape='circle', ...)

Importing needs only torch; diffusers and transformers are imported by the calls that use them.
"""

from vecattention.testbed.generate.judge import Seen, look, score
from vecattention.testbed.generate.network import Sizes, load
from vecattention.testbed.generate.report import make
from vecattention.testbed.generate.scenes import Scene

__all__ = ["Scene", "Seen", "Sizes", "load", "look", "make", "score"]
