"Configurations by name, user code, chance that is keyed by the sample, and the meeting of ranks."
import os, subprocess, sys, textwrap
from dataclasses import dataclass, field
import numpy as np
import pytest, torch
from clipa_nb.core import (LOCAL, Config, Local, UserError, agree, as_type, draws_of, fresh_draws, keyed_uniform, kind_class, kind_name,
                           load_user_code, need, purpose_key, unknown)

@dataclass(frozen=True)
class Part(Config):
    width: int = 4
    rate: float = 0.5

@dataclass(frozen=True)
class Special(Part):
    gate: bool = False

@dataclass(frozen=True)
class Whole(Config):
    part: Part = field(default_factory=Part)
    rows: tuple[Part, ...] = (Part(), Part(8))
    extra: Part | None = None
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0., 1.)
    name: str = 'x'
    chunk: int | str | None = 'auto'

@pytest.mark.parametrize('path, text, want', [
    ('part.width', '7', lambda c: c.part.width == 7), ('part.rate', '2e-3', lambda c: c.part.rate == 0.002), ('rows.1.width', '1e3', lambda c: c.rows[1].width == 1000),
    ('sizes', '(3, 4, 5)', lambda c: c.sizes == (3, 4, 5)), ('sizes', '3,4', lambda c: c.sizes == (3, 4)), ('name', '3', lambda c: c.name == '3'),
    ('extra', 'None', lambda c: c.extra is None), ('chunk', '512', lambda c: c.chunk == 512), ('chunk', 'None', lambda c: c.chunk is None), ('chunk', 'auto', lambda c: c.chunk == 'auto'), ('pair', '[0.4, 1]', lambda c: c.pair == (0.4, 1.)), ('rows.0.rate', '1', lambda c: isinstance(c.rows[0].rate, float)),
])
def test_any_field_can_be_set_from_text(path, text, want): assert want(Whole().set(path, text))

@pytest.mark.parametrize('path, text, says', [
    ('part.widht', '7', 'did you mean width'), ('part.width', 'wide', "part.width: found 'wide', expected a whole number"), ('part.width', '1.5', 'a whole number'),
    ('part.width', 'True', 'a whole number'), ('rows.2.width', '1', 'it has 2 entries'), ('rows.x', '1', 'it has 2 entries'), ('extra.width', '1', 'extra is None' if False else 'it is None'),
    ('pair', '1', 'expected'), ('pair', '1,2,3', 'found 3 values, expected 2'), ('sizes.0.x', '1', 'has no fields'), ('nme', 'y', 'did you mean name'),
])
def test_a_wrong_setting_is_refused_by_name(path, text, says):
    with pytest.raises(UserError, match=says.replace('(', r'\(')): Whole().set(path, text)

def test_a_kind_survives_json_and_differs_in_diff():
    whole = Whole(part=Special(gate=True), rows=(Part(), Special(2)), extra=Special())
    again = Whole.from_json(whole.to_json())
    assert again == whole and type(again.part) is Special and type(again.rows[1]) is Special
    assert Config.from_json(whole.to_json()) == whole
    assert 'part.kind' in Whole().diff(whole) and 'rows.1.kind' in Whole().diff(whole)
    assert 'kind' not in Whole().to_dict()['part'], 'a kind is written only where it says something'

@pytest.mark.parametrize('name, says', [
    ('clip:ModelConfg', 'did you mean ModelConfig'), ('no_such_room:X', 'no module no_such_room'), ('os', "expected 'module:Class'"), ('user.nowhere:X', r'--with nowhere\.py'),
    ('../os:system', "expected 'module:Class'"), ('core:UserError', 'unknown Config in core'),
])
def test_a_kind_names_configurations_of_this_package_only(name, says):
    with pytest.raises(UserError, match=says): kind_class(name)

def test_a_kind_must_be_what_the_field_asks_for():
    with pytest.raises(UserError, match='unknown Part'): Whole.from_dict({'part': {'kind': 'clip:ModelConfig'}})

def test_unknown_fields_in_json_are_refused():
    with pytest.raises(UserError, match='did you mean width'): Whole.from_dict({'part': {'wdth': 3}})
    with pytest.raises(UserError, match='part.width: found'): Whole.from_dict({'part': {'width': 'a'}})
    with pytest.raises(UserError, match='expected a table'): Whole.from_dict({'part': 3, 'rows': 4} and [1])

def test_user_code_is_found_here_and_in_new_processes(tmp_path, monkeypatch):
    path = tmp_path / 'my_paper.py'
    path.write_text(textwrap.dedent('''
        from dataclasses import dataclass
        from clipa_nb.core import Config
        @dataclass(frozen=True)
        class Mine(Config):
            n: int = 1
    '''))
    monkeypatch.setenv('CLIPA_USER_FILES', '')
    mine = load_user_code(path).Mine
    assert kind_name(mine) == 'user.my_paper:Mine' and Config.from_json(mine(3).to_json()) == mine(3)
    code = f'import pickle, clipa_nb.core; assert pickle.loads({__import__("pickle").dumps(mine(4))!r}).n == 4'
    subprocess.run([sys.executable, '-c', code], check=True, env=dict(os.environ))
    with pytest.raises(UserError, match='same name'):
        (tmp_path / 'b').mkdir(); (tmp_path / 'b/my_paper.py').write_text('')
        load_user_code(tmp_path / 'b/my_paper.py')
    with pytest.raises(UserError, match='existing Python file'): load_user_code(tmp_path / 'no.py')
    (tmp_path / 'broken.py').write_text('1 / 0')
    with pytest.raises(UserError, match='cannot be run: ZeroDivisionError'): load_user_code(tmp_path / 'broken.py')

def test_keyed_numbers_are_the_same_compiled_and_cut():
    draw = draws_of(3, np.arange(64))
    key = purpose_key('image tokens')
    u = keyed_uniform(draw, key, 33)
    compiled = torch.compile(lambda d: keyed_uniform(d, key, 33), backend='aot_eager', fullgraph=True)
    assert torch.equal(compiled(draw), u) and torch.equal(keyed_uniform(draw[7:9], 'image tokens', 5), u[7:9, :5])
    assert u.min() >= 0 and u.max() < 1 and len(draw.unique()) == 64

def test_keyed_numbers_look_uniform_and_independent():
    u = keyed_uniform(draws_of(0, np.arange(20_000)), 'a', 8)
    assert abs(u.mean() - 0.5) < 4.5 / (12 * u.numel())**0.5
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - u.numel() / 64).abs().max() / (u.numel() / 64)**0.5) < 5
    assert torch.corrcoef(u.T).fill_diagonal_(0).abs().max() < 5 / 20_000**0.5
    v = keyed_uniform(draws_of(0, np.arange(20_000)), 'b', 1)[:, 0]
    assert abs(torch.corrcoef(torch.stack([u[:, 0], v]))[0, 1]) < 5 / 20_000**0.5

def test_fresh_draws_follow_the_default_generator():
    torch.manual_seed(0); a = fresh_draws(4)
    torch.manual_seed(0); assert torch.equal(fresh_draws(4), a) and len(a.unique()) == 4

def test_ranks_agree_or_refuse_together():
    class Others(Local):
        size = 2
        def __init__(self, other): self.other = other
        def gather(self, x): return torch.cat([x, torch.tensor([self.other])])
    agree('', Others([0, 5]), rows=5)
    with pytest.raises(UserError, match='ranks disagree on rows of it: 5 on rank 0, 6 on rank 1'): agree('', Others([0, 6]), rows_of_it=5)
    with pytest.raises(UserError, match='rank 1 refused'): agree('', Others([1, 5]), rows=5)
    with pytest.raises(UserError, match='mine'): agree('mine', Others([0, 0]), rows=5)

def test_names_and_extras_advise():
    assert 'did you mean toy?' in str(unknown('recipe', 'tooy', ['toy', 'h14']))
    with pytest.raises(UserError, match=r"clipa_nb\[demo\]"): need('no_such_module', 'demo', 'the picture')
    with pytest.raises(UserError, match='expected a number'): as_type(float, 'x', 'rate')
