"clipa data: what is made, described, checked and shrunk; what is refused, and what a kill or a full disk leaves."
import errno, io, json, os, signal, subprocess, sys, tarfile, time
from pathlib import Path
import pytest, torch
from PIL import Image
from clipa_nb.app import data_tools
from clipa_nb.app.data_tools import check, data, losses, make_toy, parts_of, shrink, shrunk, stats
from clipa_nb.core import UserError
from clipa_nb.data import Damaged, open_pairs
from clipa_nb.engine.pictures import PictureFile, jpeg
from clipa_nb.engine.shards import write_shards

def rows_of(where):
    source = open_pairs(str(where))
    return [source.read(i) for i in range(len(source))]

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "Sixty pairs of 64 pixels in three shards."
    from clipa_nb.recipes import ToyData
    where = tmp_path_factory.mktemp('toy') / 'shards'
    write_shards(ToyData(n=60).samples(), where, per_shard=20)
    return where

@pytest.fixture
def damaged(tmp_path):
    "Forty pairs: one is no picture, one has no caption, one has no bytes; the second of two shards is cut."
    from clipa_nb.recipes import ToyData
    where = tmp_path / 'damaged'
    where.mkdir()
    samples = list(ToyData(n=40).samples())
    for part in (0, 1):
        with tarfile.open(where / f'{part:06d}.tar', 'w') as t:
            for i, (key, picture, text, meta) in enumerate(samples[20 * part:20 * part + 20]):
                picture = {3: b'no picture', 5: b''}.get(i, picture) if not part else picture
                for ending, content in (('jpg', picture), ('txt', text.encode()), ('json', json.dumps(meta).encode())):
                    if (part, i, ending) == (0, 7, 'txt'): continue
                    info = tarfile.TarInfo(f'{key}.{ending}'); info.size = len(content); t.addfile(info, io.BytesIO(content))
    cut = where / '000001.tar'
    cut.write_bytes(cut.read_bytes()[:30_000])
    return where

def test_a_smaller_copy_holds_the_same_pairs(toy, tmp_path):
    said = []
    got = shrink(str(toy), tmp_path / 'small', short=32, workers=1, say=said.append)
    big, small = rows_of(toy), rows_of(tmp_path / 'small')
    assert got['samples'] == len(small) == 60 and not got['lost']
    assert [(r['key'], r['text'], r['json']['label']) for r in small] == [(r['key'], r['text'], r['json']['label']) for r in big]
    assert {PictureFile(r['image']).size for r in small} == {(32, 32)}
    assert sorted(p.name for p in (tmp_path / 'small').glob('*.tar')) == ['000000.tar', '000001.tar', '000002.tar']
    assert (tmp_path / 'small' / '000000.tar.idx').exists() and not list((tmp_path / 'small').glob('.shrink*')) and not (tmp_path / 'small' / '.unfinished').exists()
    assert any('short side 32' in line and 'this set' in line for line in said)

def test_workers_write_the_same_bytes(toy, tmp_path):
    for n in (1, 2): shrink(str(toy), tmp_path / str(n), short=40, workers=n, say=lambda line: None)
    for p in (tmp_path / '1').glob('*.tar'): assert p.read_bytes() == (tmp_path / '2' / p.name).read_bytes()

def test_smaller_pictures_keep_their_bytes():
    pixels = torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8)
    file = jpeg(pixels)
    assert shrunk(file, 64) == (file, (50, 30)) # no larger: the same bytes
    png = io.BytesIO(); Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(png, 'png')
    data, size = shrunk(png.getvalue(), 64) # not a JPEG file: becomes one, of the same size
    assert size == (50, 30) and data[:2] == b'\xff\xd8'
    data, size = shrunk(file, 15)
    assert size == (25, 15) == PictureFile(data).size

def test_what_small_copies_lose():
    told = losses([(640, 480)], shorts=(112, 153), size=84)
    assert told[112][0] > told[153][0] and told[112][1] > 1 > told[153][1] # a copy of 153 pixels holds every crop of 40 %
    assert losses([(84, 84)], shorts=(84,), scale=1.)[84] == (0., 1.)

SHRINK = 'import sys; from clipa_nb.cli import main; sys.exit(main(sys.argv[1:]))'

def test_a_shrink_that_was_killed_goes_on(tmp_path):
    "SIGKILL between two shards: the same command finishes, and nothing is written twice or torn."
    from clipa_nb.recipes import ToyData
    where, out = tmp_path / 'toy', tmp_path / 'small'
    write_shards(ToyData(n=400).samples(), where, per_shard=20)
    command = [sys.executable, '-c', SHRINK, 'data', 'shrink', str(where), str(out), '--short', '32', '--workers', '1']
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.time() + 60
    while time.time() < until and job.poll() is None and len(list(out.glob('*.tar'))) < 3: time.sleep(0.002)
    job.send_signal(signal.SIGKILL); job.communicate()
    done = len(list(out.glob('*.tar')))
    assert 3 <= done <= 20
    if job.returncode == -9: # not so quick that it was over
        with pytest.raises(UserError, match='unfinished'): open_pairs(str(out))
    stamps = {p.name: p.stat().st_mtime_ns for p in out.glob('*.tar')}
    subprocess.run(command, check=True, capture_output=True)
    assert [r['text'] for r in rows_of(out)] == [r['text'] for r in rows_of(where)]
    kept = sum(p.stat().st_mtime_ns == stamps.get(p.name) for p in out.glob('*.tar'))
    assert kept >= done - 1 # one may have been under way

def test_somebody_elses_directory_is_refused(toy, tmp_path):
    with pytest.raises(UserError, match='already holds shards'): shrink(str(toy), toy, say=print)
    out = tmp_path / 'out'
    out.mkdir(); (out / '.shrink.jsonl').write_text(json.dumps(dict(source='other', samples=3, content='', short=9, quality=95, parts=1)) + '\n')
    with pytest.raises(UserError, match='part of another set .source was other'): shrink(str(toy), out, say=print)
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot make the directory'): shrink(str(toy), tmp_path / 'file' / 'x', say=print)

def test_a_full_disk_keeps_what_is_done(toy, tmp_path, monkeypatch):
    real, calls = data_tools.write_shard, []
    def full(path, samples):
        calls.append(path)
        if len(calls) == 2: raise OSError(errno.ENOSPC, 'No space left on device')
        return real(path, samples)
    monkeypatch.setattr(data_tools, 'write_shard', full)
    with pytest.raises(Damaged, match='is full .* after 1 of 3 shards, which are kept'): shrink(str(toy), tmp_path / 'x', short=32, workers=1, say=print)
    assert [p.name for p in (tmp_path / 'x').glob('*.tar')] == ['000000.tar']
    assert shrink(str(toy), tmp_path / 'x', short=32, workers=1, say=print)['samples'] == 60

@pytest.mark.filterwarnings('ignore:.*left out|.*cut short')
def test_damage_is_left_out_of_a_copy_and_told(damaged, tmp_path):
    said = []
    got = shrink(str(damaged), tmp_path / 'x', short=32, workers=1, limit=0.5, say=said.append)
    assert got['samples'] == len(rows_of(tmp_path / 'x')) and got['lost'] == {'000000.tar: not an image': 2} # the index had left out the others
    assert any('not an image' in line for line in said)

def test_too_much_damage_ends_a_copy(tmp_path):
    write_shards([(f'{i:04d}', b'no picture', 'a red star', {}) for i in range(100)], tmp_path / 'bad')
    with pytest.raises(Damaged): shrink(str(tmp_path / 'bad'), tmp_path / 'x', workers=1, say=print)

def test_a_sound_set_passes(toy, clipa):
    assert 'all 60 pairs are sound' in clipa('data', 'check', toy).stdout
    assert check(str(toy), workers=2, say=lambda line: None) == {}

def test_damage_is_named_and_ends_with_1(damaged, clipa):
    done = clipa('data', 'check', damaged, check=1)
    assert '000000.tar: not an image × 2' in done.stdout and 'cut short' in done.stdout + done.stderr
    assert 'are damaged' in done.stderr and 'Traceback' not in done.stderr

def test_folders_and_tables_are_checked_too(tmp_path, clipa):
    folder = tmp_path / 'folder'
    folder.mkdir()
    for i in range(4):
        (folder / f'{i}.jpg').write_bytes(jpeg(torch.full((3, 20, 20), 60 * i, dtype=torch.uint8)) if i != 2 else b'no picture')
        (folder / f'{i}.txt').write_text(f'picture {i}')
    assert 'not an image × 1, first 2' in clipa('data', 'check', folder, check=1).stdout
    (folder / '2.jpg').unlink(); (folder / '2.txt').unlink()
    (tmp_path / 'table.csv').write_text('filepath,title\n' + ''.join(f'folder/{i}.jpg,picture {i}\n' for i in (0, 1, 3)))
    assert 'all 3 pairs are sound' in clipa('data', 'check', tmp_path / 'table.csv').stdout
    (tmp_path / 'table.csv').write_text('filepath,title\nfolder/0.jpg,a\nfolder/9.jpg,b\n')
    assert 'file is missing' in clipa('data', 'check', tmp_path / 'table.csv', check=1).stdout

def test_what_is_no_tar_is_damage(tmp_path, clipa):
    (tmp_path / 'bad').mkdir(); (tmp_path / 'bad' / '000000.tar').write_bytes(b'<html>404</html>' * 100)
    assert 'is not a tar file' in clipa('data', 'check', tmp_path / 'bad', check=1).stderr

def test_statistics(toy):
    got = stats(str(toy), n=30, say=lambda line: None)
    assert got['samples'] == 60 and got['looked_at'] == 30 and got['short_side'] == 64 and not got['damaged'] and 0 <= got['repeated'] < 1

def test_parts_are_shards_or_thousands(toy, tmp_path):
    assert parts_of(open_pairs(str(toy))) == [(0, 20), (20, 40), (40, 60)]
    class Long:
        def __len__(self): return 2500
    assert parts_of(Long()) == [(0, 1000), (1000, 2000), (2000, 2500)]

@pytest.mark.parametrize('argv, says', [
    (['check', 'x', '--n', '5'], '--n has no meaning for clipa data check'), (['stats', 'x', '--energon'], '--energon has no meaning for clipa data stats'),
    (['index', 'x', 'y'], 'a second place has no meaning for clipa data index'), (['shrink', 'x'], 'needs two places'), (['shrink', 'x', 'y', '--short', '5'], '--short 5: expected 16'),
    (['shrink', 'x', 'y', '--quality', '5'], '--quality 5: expected 50'), (['check', 'nowhere'], 'matches no tar file'), (['make-toy', 'x', '--n', '-3'], 'expected numbers of 0 or more'),
    (['check', 'x', '--workers', '-1'], 'expected numbers of 0 or more')], ids=str)
def test_flags_that_mean_nothing(clipa, tmp_path, argv, says):
    done = clipa('data', *argv, check=2, cwd=tmp_path)
    assert says in done.stderr and done.stderr.count('\n') == 1 and not list(tmp_path.iterdir())

def test_a_worker_that_is_killed_ends_the_command(toy, monkeypatch):
    def dies(source, first, last): os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(Damaged, match='a worker process was killed at sample 0'):
        list(data_tools.in_processes(dies, open_pairs(str(toy)), [(0, 20), (20, 40), (40, 60)], workers=2))
