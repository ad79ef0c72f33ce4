"""Image tars to root filesystems: see `store` for what is kept where, `unpack` for what a hostile layer may not do.

`open_image(path)` gives an `Image` with `.rootfs`, `.config`, `.id`, `.tags`. Opening one that was seen before touches
`store` and `config` only. `owners.load_owners` reads what an ordinary user's store has to remember about owners.
"""

from __future__ import annotations

from kvmsentry.image.config import ImageConfig
from kvmsentry.image.store import Image, Progress, find_image, list_images, open_image, remove_image, store_path
from kvmsentry.image.users import User, resolve_user

__all__ = [
    "Image",
    "ImageConfig",
    "Progress",
    "User",
    "find_image",
    "list_images",
    "open_image",
    "remove_image",
    "resolve_user",
    "store_path",
]
