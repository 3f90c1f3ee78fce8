"The runner of nbs/exp: its cells, what is resumed, the arms of a trial, and a training from memory."
import argparse, json, sys
from pathlib import Path
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'nbs' / 'exp'))
import lab, run as runner
from clipa_nb.recipes import TOY, stage_plan
from clipa_nb.core import UserError

TINY = TOY.replace(data=TOY.data.replace(n=300)).with_stages(dict(samples=4 * 32, batch_size=32), dict(samples=2 * 32, batch_size=32))
TINY = TINY.replace(model__image__depth=1, model__text__depth=1)

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CLIPA_EXP_CACHE', str(tmp_path / 'cache'))
    torch.set_num_threads(1)

@pytest.mark.parametrize('grid', runner.GRIDS)
def test_every_cell_has_a_name_of_its_own_and_can_be_planned(grid):
    cells = runner.GRIDS[grid]()
    names = [c.name for c in cells]
    assert cells and len(set(names)) == len(names) and all(c.flops > 0 and len(c.recipe.stages) == 2 or c.name.startswith('twin') for c in cells)

def test_cells_of_equal_compute_are_within_a_batch_of_it():
    cells = runner.law_image()
    whole = {c.facts['size']: stage_plan(c.recipe, 0)['flops'] for c in cells if c.facts['tokens'] == 64}
    for c in (c for c in cells if c.facts['budget'] == 'flops'):
        assert stage_plan(c.recipe, 0)['flops'] == pytest.approx(whole[c.facts['size']], rel=0.01)

def test_arms_spend_what_the_two_stages_spend():
    total = runner.total_flops(TOY)
    for arm in ('on', 'control', 'twin'):
        assert runner.total_flops(runner.ARMS[arm](TOY)) == pytest.approx(total, rel=0.005), arm
    assert runner.total_flops(runner.twin_short(TOY)) == pytest.approx(runner.total_flops(runner.stage1(TOY)), rel=0.005)
    again = runner.carry_on(TOY)
    assert again.stages[0] == TOY.stages[0] and again.stages[1].image_size == 32 and again.stages[1].base_lr == TOY.stages[1].base_lr
    assert runner.twin(TOY).stages[0].image_ratio == 0 and runner.twin(TOY).stages[0].image_size == 64

def test_what_is_recorded_is_not_run_again_and_cheap_cells_come_first():
    cells = runner.law_image()
    todo = runner.waiting(cells, [0, 1], [], 'law_image', 'cpu')
    assert len(todo) == 2 * len(cells) and [s for _, s in todo] == sorted(s for _, s in todo)
    first = [c.flops for c, s in todo if s == 0]
    assert first == sorted(first)
    row = dict(grid='law_image', cell=todo[0][0].name, seed=0, device='cpu')
    assert len(runner.waiting(cells, [0, 1], [row], 'law_image', 'cpu')) == len(todo) - 1
    assert len(runner.waiting(cells, [0, 1], [row], 'law_image', 'cuda')) == len(todo)

def test_training_from_memory_is_repeated_to_the_digit_and_shares_its_first_stage(monkeypatch, tmp_path):
    told = []
    a = lab.train(TINY, 3, small=True, say=told.append)
    assert [s['samples'] for s in a] == [128, 64] and {'seen', 'heldout', 'shape', 'r1'} <= set(a[0]['end']) and 'enter' in a[1] and 'enter' not in a[0]
    longer = TINY.with_stages({}, dict(samples=3 * 32))
    b = lab.train(longer, 3, small=True, say=told.append)
    assert b[0] == a[0] and len(told) == 3 # the first stage came from the cache
    monkeypatch.setenv('CLIPA_EXP_CACHE', str(tmp_path / 'other'))
    c = lab.train(TINY, 3, small=True, say=told.append)
    for x, y in zip(a, c): assert (x['losses'], x['end']) == (y['losses'], y['end'])

def test_batches_follow_the_recipe():
    memory = lab.Memory(TINY.data, 0)
    tokenizer = memory.tokenizer(TINY)
    first, second = (next(lab.stream(memory, TINY, i, tokenizer, 0)) for i in (0, 1))
    assert first['image'].shape == (32, 3, 32, 32) and second['image'].shape == (32, 3, 64, 64)
    assert first['text'].shape == (32, 9) and second['text'].shape == (32, 17) and first['valid'].all()
    seen = torch.cat([b['draw'] for b in lab.stream(memory, TINY, 0, tokenizer, 0)])
    assert len(set(seen.tolist())) == 128
    with pytest.raises(UserError, match='not cropped'): next(lab.stream(memory, TINY.with_stages(dict(crop=(0.4, 1.))), 0, tokenizer, 0))

def test_an_exam_reads_captions_as_the_stage_did():
    memory = lab.Memory(TINY.data, 0)
    tokenizer = memory.tokenizer(TINY)
    from clipa_nb.recipes import stage_text
    words = lab.Words(tokenizer, stage_text(TINY, 0, tokenizer), 9)
    text = 'there is a large red star to the left of a small blue ring on a dark background'
    said = lambda ids: [tokenizer.pieces[i] for i in ids[0].tolist()]
    assert 'ring' in said(words(text)) and 'ring' not in said(tokenizer([text], context_length=9))
    assert torch.equal(words([text, text])[0], words(text)[0]) and words.vocab_size == tokenizer.vocab_size

def test_a_trial_of_the_demo_is_written_with_its_changes():
    args = argparse.Namespace(name='B', recipe='toy', set=['model.positions=learned', 'stages.0.samples=1280'], dial=['size_1=6,22', 'glyphs=0.2'],
                              arms=['two', 'twin:model.positions=moco'])
    two, twin = runner.demo(args)
    assert dict(two.recipe.data.dials) == {'glyphs': 0.2, 'say_colour': 0.9, 'size_1': (6., 22.)}
    assert two.recipe.model.positions == 'learned' and twin.recipe.model.positions == 'moco' and two.recipe.stages[0].samples == 1280
    json.dumps({k: b for k, (a, b) in TOY.diff(two.recipe).items()})

def test_rows_are_whole(tmp_path):
    path = tmp_path / 'a' / 'rows.jsonl'
    assert lab.recorded(path) == []
    for i in range(2): lab.record(path, dict(i=i))
    assert lab.recorded(path) == [dict(i=0), dict(i=1)]
