"""What is printed and written does not depend on who reads it, and overwrites nobody's files."""

import subprocess
import sys

import pytest
from conftest import ROOT

PRINTER = """
import sys
from pathlib import Path
from lib import cli
def main(*, out: str = '') -> None:
    for i in range(20000):
        print('line', i)
    Path(out).write_text('done')
cli.run(main)
"""


@pytest.mark.parametrize('reader', ['| head -1', '>&-'])
def test_a_reader_that_goes_away_ends_the_lines_and_not_the_work(reader, tmp_path):
    command = f'{sys.executable} -c "$PRINTER" --out {tmp_path}/o {reader}'
    done = subprocess.run(
        ['bash', '-c', f'set -o pipefail; {command}'],
        cwd=ROOT, env={'PRINTER': PRINTER, 'PATH': '/usr/bin:/bin'}, capture_output=True, text=True,
    )  # fmt: skip
    assert (tmp_path / 'o').read_text() == 'done'
    assert done.returncode == 0 and done.stderr == ''


def test_a_photo_or_the_folds_are_never_overwritten_by_out(copy, demo, refusal):
    photo = next((demo / 'jpeg' / 'test').glob('*.jpg'))
    (copy / 'empty.csv').touch()
    for out in (photo, copy / 'folds.csv', copy / 'empty.csv'):
        before = out.read_bytes()
        assert '--out' in refusal('infer.py', '--home', copy, '--images', photo, '--out', out)
        assert out.read_bytes() == before
