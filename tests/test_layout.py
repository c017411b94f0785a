"""The folder `kernels/` is a source root and must hide nothing."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_folder_kernels_does_not_shadow_a_package_of_that_name(tmp_path):
    """Hugging Face's `kernels`, which transformers imports where it is installed, is found from the root as well."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("MARK = 'the installed one'\n")
    script = f"import sys; sys.path.append({str(tmp_path)!r}); import transformers, kernels; print(kernels.MARK)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout == "the installed one\n", result.stderr


def test_kernels_know_nothing_of_what_is_built_on_them():
    script = "import sys, bdpo_kernels, bdpo_kernels.rows.torch; print([m for m in ('lightning', 'transformers', "
    script += "'datasets', 'bdpo_pl') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr
