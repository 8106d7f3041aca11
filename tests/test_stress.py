"""The stress script in short: kills, two processes, random damage."""

import signal

import stress
from conftest import contents


def trained(run) -> dict[str, str]:
    """The hashes of what a training must always end with."""
    names = ('oof.csv', 'model.safetensors')
    return {k: v for k, v in contents(run).items() if k.endswith(names) and '/' in k}


def test_two_processes_share_a_run_and_one_that_is_killed_costs_nothing(copy, ok):
    train = ['train.py', '--home', copy, *stress.SMALL, '--epochs', 6, '--name']
    victim = stress.start(*train, 'shared', '--workers', 2)
    assert any('epoch  2/6' in line for line in victim.stdout)  # the first is saved then
    victim.send_signal(signal.SIGSTOP)  # a slow process is not a dead one
    other = ok(*train, 'shared')
    assert other.count('images an epoch') == 1
    assert f'fold 0 (process {victim.pid} on' in other
    victim.kill()
    victim.communicate()
    assert 'fold0/state.pt: goes on after epoch' in ok(*train, 'shared')
    ok(*train, 'whole')
    whole, shared = (trained(copy / 'runs' / name) for name in ('whole', 'shared'))
    assert whole == shared and len(whole) == 4 and stress.leftovers(copy) == []


def test_infer_goes_on_where_it_was_killed(copy, ok):
    run = copy / 'runs' / 'twin'
    infer = ['infer.py', '--home', copy, '--only', 'twin', '--n_tta', 20]
    ok(*infer)
    whole = contents(run)
    stress.unpredict(run)
    victim = stress.start(*infer)
    assert any('fold 1, ' in line for line in victim.stdout)  # its second part
    victim.send_signal(signal.SIGSTOP)
    other = ok(*infer)  # leaves that part to the victim and does the rest
    assert other.count('20 augmented passes') == 2 and 'some predictions are missing' in other
    assert f'(process {victim.pid} on' in other and not (run / 'test.csv').exists()
    victim.kill()
    victim.communicate()
    assert ok(*infer).count('20 augmented passes') == 1
    assert contents(run) == whole and stress.leftovers(copy) == []


def test_random_damage_is_refused_or_read_right(tmp_path):
    rows = list(stress.fuzz(tmp_path, 200, seed=1))
    assert all(row['good'] for row in rows), rows
    assert all(row['refused'] for row in rows) and sum(row['read right'] for row in rows) > 10
