"""VaRM (Variation Ratio Merge) as a merge method of stock mergekit: ``merge_method: varm``.

``pip install varm-merge`` is enough for ``mergekit-yaml``; where start-up files are switched off, importing
this package registers the method too. The import is cheap: mergekit and torch are loaded when mergekit is.
"""

import _varm_merge_autoload

from varm_common.moved import keep_old_names
from varm_merge.version import __version__

__all__ = ["__version__"]

_varm_merge_autoload.install()
keep_old_names(
    {
        "varm_merge.errors": "varm_common.errors",
        "varm_merge.weights": "varm_merge.merging.weights",
        "varm_merge.tensor_math": "varm_merge.merging.tensor_math",
        "varm_merge.method": "varm_merge.merging.method",
        "varm_merge.report": "varm_merge.merging.weight_log",
        "varm_merge.recipe": "varm_merge.recipes.check",
    }
)
