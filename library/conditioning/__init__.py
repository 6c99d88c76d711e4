"""HOW THE SOURCE IMAGE REACHES THE MODEL: a mode says which pixels are encoded and how the extra channels are filled.

Caching, training, previews and inference all ask a mode; none of them asks which one it is. Adding one costs a file
and a line here. Importing this package imports no torch, so that a plan can be made without it.
"""

from library.conditioning.edit import Edit
from library.conditioning.mask import Masked
from library.conditioning.mode import Images, Mode, ModeSettings
from library.conditioning.spatial import Spatial

MODES: dict[str, Mode] = {mode.name: mode for mode in (Edit(), Masked(), Spatial())}

__all__ = ["MODES", "Images", "Mode", "ModeSettings"]
