"Chapters 00, 03 and 12 under names and numbers that mean nothing, and the loss's work as it is done."
import pytest, torch, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from clipa_nb import cost
from clipa_nb.core import UserError, autocast, generator, seed_of
from clipa_nb.cost import SIZES, activation_bytes, memory, n_tokens, plan, train_flops
from clipa_nb.infonce import info_nce

H, CPU = SIZES['H/14'], torch.device('cpu')


# ---- chance ----

def test_seeds_without_a_purpose_differ():
    seeds = [seed_of(n) for n in range(-50, 1000)]
    assert len(set(seeds)) == len(seeds) and len({torch.rand(1, generator=generator(n)).item() for n in range(50)}) == 50


def test_seeds_of_recorded_runs_never_change():
    assert (seed_of(0, 'init'), seed_of(0, 'order', 1), seed_of(7, 'stage', 2), seed_of(3, 'augment')) == (3225740572664017231, 8879844671190180801, 5808595887819060079, 5464436771803082158)


# ---- names that nobody knows ----

@pytest.mark.parametrize('call, says', [
    (lambda: autocast('bf16', CPU), "unknown precision 'bf16'"), (lambda: autocast('auto', CPU), "unknown precision 'auto'"),
    (lambda: memory(H, 37, 8, 64, precision='bf16'), "unknown precision 'bf16'"), (lambda: memory(H, 37, 8, 64, checkpointing='ful'), 'did you mean full'),
    (lambda: activation_bytes(H.image, 37, 'amp-bf16'), 'did you mean amp_bf16'), (lambda: train_flops(H, 37, 8, checkpointing='ful'), 'did you mean full'),
    (lambda: plan(H, 37, 8, 64, 1, checkpointing='selectiv'), 'did you mean selective'), (lambda: plan(H, 37, 8, 64, 1, precision='half'), "unknown precision 'half'"),
    (lambda: n_tokens(100, 16), 'use 96'), (lambda: n_tokens(8, 16), 'use 16'), (lambda: n_tokens(32, 16, 0.9), 'leaves none'),
    *((lambda wrong=wrong: cost.hours(3600e12, 1e12, mfu=wrong), '0 < mfu ≤ 1') for wrong in (0, 40, float('nan'))),
    (lambda: n_tokens(-224, 14), 'positive'), (lambda: n_tokens(0, 14), 'positive'), (lambda: n_tokens(224, -14), 'positive'), (lambda: n_tokens(224, 0), 'positive')])
def test_what_means_nothing_is_refused(call, says):
    with pytest.raises(UserError, match=says): call()


# ---- the loss ----

class Four:
    "Rank 0 of four that hold the same features."
    rank, size = 0, 4
    def gather(self, x): return torch.cat([x] * 4)
    def reduce_scatter(self, x): return x.chunk(4)[0]
    def all_sum(self, x): return x * 4
    def all_max(self, x): return x


@pytest.mark.parametrize('case, comm, chunk', [('one process', {}, None), ('several ranks', {'comm': Four()}, None), ('streamed', {}, 16), ('streamed', {'comm': Four()}, 16)])
def test_the_loss_costs_what_chapter_03_says(case, comm, chunk):
    b, E = 64, 32; B = b * (4 if comm else 1)
    image, text = (F.normalize(torch.randn(b, E, generator=generator(0, s)), dim=1).requires_grad_() for s in 'it')
    in_place = {torch.ops.aten.addmm_: lambda self, x, y, *_, out_shape=None, **more: 2 * x[0] * x[1] * y[1]} # torch leaves out products that add in place
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        info_nce(image, text, torch.tensor(10.), chunk=chunk, **comm)['loss'].backward()
    assert counted.get_total_flops() == cost.LOSS[case] * b * B * E
    assert train_flops(H, 37, 8, batch=B) - train_flops(H, 37, 8) == cost.LOSS['one process'] * B * H.embed_dim
