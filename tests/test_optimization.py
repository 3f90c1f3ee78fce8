"Chapter 12: what a schedule, a rule and an optimiser refuse, and that a pattern of the chapter matches a model of the book."
import pytest, torch
from torch import nn
from clipa_nb.core import UserError
from clipa_nb.optimization import DECAYS, check_rules, is_kernel, is_matrix, lr_for, make_optimizer, param_groups, set_lr, setting, warmup_cosine


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


# ---- rules ----

def test_rules_that_cannot_be_meant():
    with pytest.raises(UserError, match='did you mean visual.fc.weight'): check_rules(NAMES, [('visual.fx.weight', 'frozen')])
    with pytest.raises(UserError, match="rule 'visual.\\*' asks for 'freeze': use a multiple of the learning rate"): check_rules(NAMES, [('visual.*', 'freeze')])
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

