"The names people expect at the top of the package, and what importing it costs."
import subprocess, sys
import pytest
import clipa_nb

def test_the_names_people_know_are_at_the_top():
    for name in ('create_model', 'create_model_and_transforms', 'create_model_from_pretrained', 'get_tokenizer', 'list_models', 'list_pretrained',
                 'save_pretrained', 'push_to_hub', 'build_zero_shot_classifier', 'info_nce', 'ModelConfig', 'CLIP', 'Recipe', 'run', 'UserError'):
        assert callable(getattr(clipa_nb, name)) and name in dir(clipa_nb), name
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"): clipa_nb.create_modle

def test_importing_the_package_imports_nothing_heavy():
    code = 'import sys, clipa_nb; assert not {"torch", "numpy", "PIL"} & set(sys.modules); clipa_nb.info_nce; assert "torch" in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)

def test_types_are_declared():
    from pathlib import Path
    assert (Path(clipa_nb.__file__).parent / 'py.typed').exists()
