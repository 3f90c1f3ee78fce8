"Chapter 12: what a schedule, a rule and an optimiser refuse, and that a pattern of the chapter matches a model of the book."
import math
from dataclasses import dataclass
import pytest, torch
from torch import nn
from clipa_nb.core import Config, UserError
from clipa_nb.optimization import DECAYS, SCHEDULES, AdamW, Constant, Cosine, RSqrt, Schedule, check_rules, is_kernel, is_matrix, lr_for, make_optimizer, param_groups, public_name, set_lr, setting, warmup_cosine


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.text = nn.ModuleDict(dict(fc=nn.Linear(4, 4), norm=nn.LayerNorm(4))), nn.ModuleDict(dict(embed=nn.Embedding(5, 4), fc=nn.Linear(4, 4)))
        self.logit_scale = nn.Parameter(torch.tensor(1.))


NAMES = [n for n, _ in Net().named_parameters()]


# ---- schedule ----

@pytest.mark.parametrize('total, warmup', [(10, 20), (10, -1), (0, 1)])
def test_a_warm_up_fits_its_stage(total, warmup):
    with pytest.raises(UserError, match=f'a warm-up of {warmup} steps in a stage of {total}: use 0 to {total}'): warmup_cosine(0, total, warmup, 1.)


def test_both_conventions_of_the_first_step():
    assert [warmup_cosine(s, 100, 10, 2.) for s in (0, 5, 10)] == [0., 1., 2.] and warmup_cosine(0, 100, 10, 2., shift=1) == 0.2
    assert warmup_cosine(55, 100, 10, 2.) == pytest.approx(1.) and [warmup_cosine(s, 100, 0, 2., floor=0.5) for s in (0, 100, 120)] == pytest.approx([2., 0.5, 0.5])
    assert lr_for(8e-6, 65_536) == pytest.approx(2.048e-3)


@pytest.mark.parametrize('kind', SCHEDULES)
def test_a_schedule_is_a_config(kind):
    schedule = SCHEDULES[kind](warmup=10)
    assert Schedule.from_json(schedule.to_json()) == schedule and isinstance(schedule, Schedule) and type(Schedule.from_json(schedule.to_json())) is SCHEDULES[kind]
    assert [schedule.rate(s, 100, 2.) for s in (0, 5, 10)] == [0., 1., 2.] and schedule.set('warmup', '3').warmup == 3
    assert SCHEDULES[kind]().rate(0, 100, 2.) == 2.
    for warmup, total in ((20, 10), (-1, 10)):
        with pytest.raises(UserError, match=f'a warm-up of {warmup} steps in a stage of {total}: use 0 to {total}'): SCHEDULES[kind](warmup).rate(0, total, 1.)
    with pytest.raises(NotImplementedError): Schedule().rate(0, 1, 1.)

def test_a_cosine_is_that_of_the_chapter():
    for step in range(0, 101, 7): assert Cosine(10, 1, 0.1).rate(step, 100, 3.) == warmup_cosine(step, 100, 10, 3., floor=0.1 * 3., shift=1)
    assert Cosine(floor=0.25).rate(100, 100, 2.) == pytest.approx(0.5)

def big_vision(step, total, peak, warmup, cooldown, timescale):
    "Its formula, as published: the rate since the warm-up, times both ramps."
    rate = peak / math.sqrt(1 + (step - warmup) / timescale) if warmup <= step else peak
    return rate * min(1, step / warmup) * min(1, (total - step) / cooldown)

def test_a_reciprocal_square_root_is_big_visions():
    for step in range(201): assert RSqrt(20, 30, 40.).rate(step, 200, 3.) == pytest.approx(big_vision(step, 200, 3., 20, 30, 40.), rel=1e-12)
    plain = RSqrt(10)
    assert plain.rate(10_010, 50_000, 1.) == pytest.approx(0.5 ** 0.5) and plain.rate(30_010, 50_000, 1.) == pytest.approx(0.5)
    assert plain.rate(500, 1000, 1.) == plain.rate(500, 2000, 1.) # it does not know the end
    assert RSqrt(cooldown=10).rate(100, 100, 1.) == 0 == RSqrt(cooldown=10).rate(101, 100, 1.)
    with pytest.raises(UserError, match='a warm-up of 60 steps and a cooldown of 50 in a stage of 100: use 0 to 100 in all'): RSqrt(60, 50).rate(0, 100, 1.)
    with pytest.raises(UserError, match='cooldown -1: expected 0 or more'): RSqrt(cooldown=-1)
    with pytest.raises(UserError, match='timescale 0: expected a number of steps'): RSqrt(timescale=0)

def test_a_constant_stays(): assert {Constant().rate(s, 100, 2.) for s in (0, 50, 99)} == {2.}


# ---- rules ----

def test_rules_that_cannot_be_meant():
    with pytest.raises(UserError, match='did you mean visual.fc.weight'): check_rules(NAMES, [('visual.fx.weight', 'frozen')])
    with pytest.raises(UserError, match="rule 'visual.\\*' asks for 'freeze': use a multiple of the learning rate"): check_rules(NAMES, [('visual.*', 'freeze')])
    for value in (-1, math.nan, math.inf):
        with pytest.raises(UserError, match=f"rule 'visual.\\*' asks for {value} times the learning rate: use a number from 0"): check_rules(NAMES, [('visual.*', value)])
    with pytest.raises(UserError, match="asks for True: use a multiple"): check_rules(NAMES, [('visual.*', True)])
    with pytest.raises(UserError, match='did you mean kernels'): param_groups(Net(), 1e-3, 0.2, decay='kernel')
    with pytest.raises(UserError, match='nothing is left to train'): make_optimizer(Net(), 0.1, rules=[('*', 'frozen')])


def test_the_first_rule_decides_for_rate_and_decay_apart():
    rules = [('visual.fc.*', 10.), ('visual.*', 'frozen'), ('text.embed.weight', 'decay'), ('text.*', 0.5)]
    assert setting('visual.fc.weight', rules) == (10., None) and setting('text.embed.weight', rules) == (0.5, True) and setting('logit_scale', rules) == (None, None)
    groups = param_groups(net := Net(), 1e-3, 0.2, rules)
    assert sorted({n for g in groups for n in g['names']}) == sorted(n for n, p in net.named_parameters() if p.requires_grad)
    assert [g['names'] for g in param_groups(Net(), 1e-3, 0.2, iter(rules))] == [g['names'] for g in groups]


def test_layer_wise_decay_matches_the_towers_of_the_book():
    "Chapter 12's first exercise."
    from clipa_nb.clip import ModelConfig, build_clip
    from clipa_nb.cost import Tower
    n = 3
    model = build_clip(ModelConfig(image=Tower(16, n, 2, 32), text=Tower(16, 1, 2, 32), embed_dim=8, image_size=16, patch=8, context_length=4, vocab_size=20))
    groups = param_groups(model, 1., 0.2, [(f'visual.encoder.blocks.{i}.*', 0.8 ** (n - i)) for i in range(n)])
    assert {g['lr_multiple'] for g in groups} == {1., *(0.8 ** (n - i) for i in range(n))}
    with pytest.raises(UserError, match='visual.blocks'): param_groups(model, 1., 0.2, [('visual.blocks.0.*', 0.5)])


def test_the_two_rules_for_decay_differ_on_tables():
    net = Net()
    assert DECAYS == dict(kernels=is_kernel, matrices=is_matrix)
    assert is_kernel(net.text['fc'], 'weight', net.text['fc'].weight) and not is_kernel(net.text['embed'], 'weight', net.text['embed'].weight)
    assert is_matrix(net.text['embed'], 'weight', net.text['embed'].weight) and not is_matrix(net, 'logit_scale', net.logit_scale)


def test_every_group_takes_its_multiple():
    optimizer = make_optimizer(Net(), 1., rules=[('visual.*', 3.)]); set_lr(optimizer, 0.5)
    assert {(g['lr_multiple'], g['lr']) for g in optimizer.param_groups} == {(1., 0.5), (3., 1.5)}


def test_rules_may_come_from_a_generator():
    net = nn.Sequential(nn.Linear(2, 2)); rules = [('0.weight', 0.5), ('0.bias', 'frozen')]
    assert [(g['lr_multiple'], g['names']) for g in param_groups(net, 1., 0.2, (r for r in rules))] == [(0.5, ['0.weight'])]
    assert make_optimizer(nn.Sequential(nn.Linear(2, 2)), 1., rules=iter(rules)).param_groups[0]['lr'] == 0.5



# ---- a model and its objective ----

class Both(nn.Module):
    "As chapter 13's task."
    def __init__(self, model=None, objective=None):
        super().__init__()
        self.model, self.objective = model or Net(), objective or nn.ModuleDict(dict(projector=nn.Linear(3, 3), table=nn.Embedding(2, 3)))


def test_public_names():
    assert [public_name(n) for n in ('model.visual.x', 'objective.projector.weight', 'visual.x', 'visual.model.x', 'model.model.x')] == ['visual.x', 'objective.projector.weight', 'visual.x', 'visual.model.x', 'model.x']


def test_rules_see_a_task_under_public_names():
    rules = [('visual.*', 'frozen'), ('text.fc.*', 0.5), ('objective.table.*', 'frozen'), ('objective.projector.bias', 'decay'), ('objective.*', 3.)]
    groups = param_groups(task := Both(), 2., 0.2, rules)
    found = {n: (g['lr_multiple'], g['weight_decay']) for g in groups for n in g['names']}
    assert found == {'text.embed.weight': (1., 0.), 'text.fc.weight': (0.5, 0.2), 'text.fc.bias': (0.5, 0.), 'logit_scale': (1., 0.), 'objective.projector.weight': (3., 0.2), 'objective.projector.bias': (3., 0.2)}
    assert not task.objective.table.weight.requires_grad and not task.model.visual.fc.weight.requires_grad
    for g in groups: assert [public_name(n) for n, p in task.named_parameters() if any(p is q for q in g['params'])] == g['names']
    with pytest.raises(UserError, match='did you mean visual'): param_groups(Both(), 1., 0.2, [('model.visual.*', 'frozen')])
    with pytest.raises(UserError, match="'objective.\\*'"): param_groups(Both(objective=nn.Identity()), 1., 0.2, [('objective.*', 'frozen')])


def test_a_task_is_grouped_as_its_model():
    rules = [('visual.fc.*', 10.), ('text.embed.weight', 'decay')]
    alone, together = param_groups(Net(), 1., 0.2, rules), param_groups(Both(objective=nn.Identity()), 1., 0.2, rules)
    def told(groups): return [(g['names'], g['lr_multiple'], g['weight_decay']) for g in groups]
    assert told(alone) == told(together)


def test_adamw_is_a_config_that_builds():
    cfg = AdamW(weight_decay=0.3, beta1=0.8, beta2=0.99, eps=1e-6, decay='matrices', decayed=('logit_scale', 'objective.projector.bias'))
    assert Config.from_json(cfg.to_json()) == cfg and AdamW().set('decayed', 'a.*,b').decayed == ('a.*', 'b')
    optimizer = cfg.build(Both(), 0.5, [('text.*', 0.1), ('objective.*', 'no_decay')])
    assert isinstance(optimizer, torch.optim.AdamW) and {(g['betas'], g['eps']) for g in optimizer.param_groups} == {((0.8, 0.99), 1e-6)}
    decayed = {n for g in optimizer.param_groups if g['weight_decay'] == 0.3 for n in g['names']}
    assert decayed == {'visual.fc.weight', 'text.fc.weight', 'text.embed.weight', 'logit_scale'} # a stage's rules come first
    assert {g['lr'] for g in optimizer.param_groups} == {0.5, 0.05}
    def told(o): return [(g['names'], g['lr'], g['weight_decay'], g['betas'], g['eps']) for g in o.param_groups]
    assert told(AdamW().build(Net(), 0.1)) == told(make_optimizer(Net(), 0.1))
    with pytest.raises(UserError, match='did you mean logit_scale'): AdamW(decayed=('logit_scales',)).build(Net(), 0.1)
    with pytest.raises(UserError, match='nothing is left to train'): AdamW().build(Both(), 0.1, [('*', 'frozen')])
    for wrong, words in ((dict(decay='kernel'), 'did you mean kernels'), (dict(beta2=1.), 'beta2 1.0: expected'), (dict(weight_decay=-1.), 'weight_decay -1.0: expected 0 or more')):
        with pytest.raises(UserError, match=words): AdamW(**wrong)


@dataclass(frozen=True)
class Descent(Config):
    "An optimiser of a paper's own."
    momentum: float = 0.9
    def build(self, module, lr, rules=()): return torch.optim.SGD(param_groups(module, lr, 0., rules), lr=lr, momentum=self.momentum)


def test_another_optimiser_takes_the_same_rules():
    optimizer = Descent().build(task := Both(), 1., [('objective.*', 2.), ('text.*', 'frozen')]); set_lr(optimizer, 0.1)
    assert {(g['lr_multiple'], g['lr']) for g in optimizer.param_groups} == {(1., 0.1), (2., 0.2)} and not task.model.text.fc.weight.requires_grad
