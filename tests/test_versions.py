"""Each script ends in one sentence where a package is missing or of another version."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from lib import versions


def test_every_package_that_is_wrong_is_named_with_what_is_found_and_what_is_needed(
    tmp_path, monkeypatch
):
    found = {'a': '2.2.1', 'b': '2.14.1+cu130', 'c': '1.0.0', 'd': '0.1'}
    (tmp_path / 'a').write_text('# of\na>=2.2.2,<3\nb>=2.9,<2.15  # why\n\nc>=1.0,<2\nd\nzzz>=1\n')

    def version(name):
        if name not in found:
            raise versions.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, 'version', version)
    wrong = versions.find_wrong(tmp_path / 'a')
    assert wrong == ['a is 2.2.1 and must be <3,>=2.2.2', 'zzz>=1 is missing']
    found |= {'a': '3.0', 'b': '2.15.0', 'zzz': '1'}
    assert [text.split()[0] for text in versions.find_wrong(tmp_path / 'a')] == ['a', 'b']


@pytest.mark.parametrize('script', ['folds.py', 'train.py', 'infer.py', 'blend.py'])
def test_a_script_ends_before_it_imports_a_package_of_another_version(script, tmp_path):
    for name, number in (('fire', '0.1'), ('pandas', '1.5.3')):
        (tmp_path / f'{name}.py').write_text('raise RuntimeError("an error of a package")')
        (tmp_path / f'{name}-{number}.dist-info').mkdir()
        text = f'Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n'
        (tmp_path / f'{name}-{number}.dist-info' / 'METADATA').write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, ROOT / script, '--help'],
        env=os.environ | {'PYTHONPATH': path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == '' and done.stderr.count('\n') == 1
    assert done.stderr.startswith('error: pandas is 1.5.3 and must be ')
    assert 'fire is 0.1' in done.stderr and 'pip install -r' in done.stderr
