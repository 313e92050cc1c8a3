"""VaRM (Variation Ratio Merge) as a merge method of stock mergekit: ``merge_method: varm``.

``pip install varm-merge`` is enough for ``mergekit-yaml``; where start-up files are switched off, importing
this package registers the method too. The import is cheap: mergekit and torch are loaded when mergekit is.
"""

import _varm_merge_autoload

from varm_merge.version import __version__

__all__ = ["__version__"]

_varm_merge_autoload.install()
