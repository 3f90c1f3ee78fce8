"The speedrun: the test of the marks, the seeds, what an idea may change, and the ratio of times."
import dataclasses, json
import pytest
import torch
from clipa_nb.app.run import Options
from clipa_nb.app.speedrun import ENOUGH, MARKS, check_idea, judge, p_value, reference_seconds, seeds_of, speedrun, student_tail
from clipa_nb.core import UserError
from clipa_nb.recipes import TOY

def metrics(*rows): return [dict(zip(MARKS, r)) for r in rows]

@pytest.mark.parametrize('df,t,tail', [(1, 31.8205, 0.01), (2, 6.9646, 0.01), (4, 3.7469, 0.01), (9, 1.8331, 0.05), (30, 2.4573, 0.01), (2, 0., 0.5)])
def test_students_tail_is_the_printed_table(df, t, tail):
    assert student_tail(t, df) == pytest.approx(tail, abs=2e-5)
    assert student_tail(-t, df) == pytest.approx(1 - tail, abs=2e-5)

def test_a_mean_above_the_mark_is_not_enough():
    assert p_value([0.86, 0.88, 0.87], 0.8) < ENOUGH
    assert p_value([0.80, 0.94, 0.87], 0.8) > 0.05
    assert p_value([0.95], 0.8) == 1. # nobody knows the spread of one seed
    assert p_value([0.9, 0.9], 0.8) == 0. and p_value([0.8, 0.8], 0.8) == 1.
    assert p_value([0.7, 0.72, 0.71], 0.8) > 0.99

def test_every_mark_must_be_met():
    good = judge(metrics((.90, .80, .55), (.91, .81, .56), (.92, .80, .55)))
    assert good['counts'] and [m['mark'] for m in good['marks'].values()] == [.80, .65, .45]
    low = judge(metrics((.90, .80, .44), (.91, .81, .45), (.92, .80, .44)))
    assert not low['counts'] and [m['p'] < ENOUGH for m in low['marks'].values()] == [True, True, False]
    with pytest.raises(UserError, match='run 1 has no val/image_to_text_R@1'): judge([*metrics((1, 1, 1)), {k: 1. for k in list(MARKS)[:2]}])

def test_seeds_follow_from_the_recipe_and_not_from_its_name():
    assert seeds_of(TOY, 5)[:3] == seeds_of(TOY) == seeds_of(TOY.replace(name='mine'))
    assert not set(seeds_of(TOY)) & set(seeds_of(TOY.replace(model__embed_dim=96)))
    assert all(0 <= s < 2**31 for s in seeds_of(TOY, 20)) and len(set(seeds_of(TOY, 20))) == 20

@pytest.mark.parametrize('change,said', [
    (dict(data__n=61_000), 'other pairs'), (dict(init_from=('runs/demo',)), 'begins with weights'), (dict(evaluations=()), 'leave `evaluations`')])
def test_the_task_stays(change, said):
    check_idea(TOY.replace(name='mine', model__embed_dim=96))
    with pytest.raises(UserError, match=said): check_idea(TOY.replace(**change))

def test_a_stage_may_not_bring_pairs_of_its_own():
    with pytest.raises(UserError, match='other pairs'): check_idea(TOY.with_stages(dict(data=TOY.data.replace(n=10))))

def test_the_references_time_is_its_median_steps():
    two = TOY.with_stages(dict(samples=10 * 128), dict(samples=4 * 128))
    assert reference_seconds(two, [[[1., 1., 9.], [2., 2., 2.]], [[1., 1., 1.], [2., 2., 50.]]]) == 10 * 1. + 4 * 2.

def test_a_smoke_speedrun(tmp_path, capsys):
    torch.set_num_threads(1)
    options = Options(smoke=True, device='cpu', precision='fp32', out=str(tmp_path / 'a'))
    idea = TOY.replace(name='idea', stages=TOY.stages[:1])
    row = speedrun(idea, options, n=2)
    assert row == json.loads((tmp_path / 'a' / 'speedrun.json').read_text())
    assert row['ratio'] == pytest.approx(sum(row['seconds']) / 2 / row['reference_seconds']) and not row['counts']
    assert {p.name for p in (tmp_path / 'a').iterdir() if p.name.startswith('seed-')} == {f'seed-{s}' for s in row['seeds']}
    assert 'does not count' in capsys.readouterr().out
    again = speedrun(idea, options, n=2) # finished runs are not trained again
    assert again['seconds'] == row['seconds'] and 'is finished' in capsys.readouterr().out
