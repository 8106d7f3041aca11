"""What is printed and written does not depend on who reads it, and overwrites nobody's files."""

import subprocess
import sys

import pytest
from conftest import ROOT

from lib import files
from lib.cli import Stop

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


HEADER = ['image_name', 'pred', 'prob']


def test_out_replaces_its_own_table_and_nothing_else(tmp_path):
    files.check_out(tmp_path / 'new.csv', HEADER)
    for name, text, says in (
        ('a.JPG', 'a photo', r'\.csv'),
        ('folds.csv', 'image_name,path\n', 'exists'),
        ('empty.csv', '', 'exists'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(Stop, match=says):
            files.check_out(tmp_path / name, HEADER)
        assert (tmp_path / name).read_text() == text
    (tmp_path / 'ours.csv').write_text('image_name,pred,prob\na,1,1\n')
    files.check_out(tmp_path / 'ours.csv', HEADER)


def test_a_photo_or_the_folds_are_never_overwritten_by_out(copy, demo, refusal):
    photo = next((demo / 'jpeg' / 'test').glob('*.jpg'))
    for out in (photo, copy / 'folds.csv'):
        before = out.read_bytes()
        assert '--out' in refusal('infer.py', '--home', copy, '--images', photo, '--out', out)
        assert out.read_bytes() == before
