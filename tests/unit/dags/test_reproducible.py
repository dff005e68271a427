"""Compiling twice gives the same names: a local run's cache knows a step by its component's name."""

import subprocess
import sys
from pathlib import Path


def test_branches_of_different_lengths_are_compiled_to_the_same_yaml_in_every_process(tmp_path: Path) -> None:
    """KFP's renaming goes by a hash table whose order is another one in every process."""
    script = (
        "import sys; from pathlib import Path; from spectraqlora.settings import parse; "
        "from spectraqlora_pipelines.dags.catalogue import compile_dag; "
        "settings = parse({'methods': 'qlora,alors,sgm,hybrid', 'rounds': 3}); "
        "[compile_dag(Path(path), 'ablation', settings) for path in sys.argv[1:]]"
    )
    paths = [tmp_path / f"{number}.yaml" for number in range(5)]
    running = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(path)]) for path in paths]
    assert [process.wait(timeout=120) for process in running] == [0] * len(paths)
    assert len({path.read_text() for path in paths}) == 1
