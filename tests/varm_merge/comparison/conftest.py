"""One fork server for all tests of comparisons."""

import pytest

from varm_common.forked import run_forked
from varm_merge.comparison import harness, scores

PRELOAD = (
    *scores.PRELOAD,
    *harness.PRELOAD,
    "mergekit.scripts.run_yaml",
    "mergekit.merge",
    "mergekit.plan",
    "fusion_trainer.data.prepare",
    "fusion_trainer.training.evaluate",
)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start the server that all forks of this process come from, with everything imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        run_forked(print, log=tmp_path_factory.mktemp("server") / "log.txt", preload=PRELOAD)
