"""Faults put into the code one at a time, to see whether a test notices; run by hand.

python tests/mutations.py           # all rows of the table: about 20 minutes of one core
python tests/mutations.py heat      # those whose file, texts or tests hold this word

A test that passes does not say whether it would fail if its promise was broken. So each row below
is a fault that gives a wrong result without a message, and the tests that must fail with it. The
checkout stays as it is: each fault is put into a copy of its own. The tests must pass without any.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, '-m', 'pytest', '-x', '-n0', '-p', 'no:cacheprovider', '--tb=no']


def copy_tree(to: Path) -> None:
    """Copy all files that git tracks or does not ignore, as they are now."""
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split('\0')):
        if (ROOT / name).is_file():  # one that git tracks may be deleted
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def judge(file: str, text: str, other: str, tests: str) -> tuple[str, str]:
    """Whether `tests` notice that `text` became `other`: caught, missed or error; and the reason.

    `tests`: arguments of pytest, which runs in the folder of the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        path = Path(folder, file)
        code = path.read_text(encoding='utf-8')
        if (n := code.count(text)) != 1:
            return 'error', f'; the text to replace is there {n} times, not once'
        path.write_text(code.replace(text, other), encoding='utf-8')
        done = subprocess.run(
            [*PYTEST, *shlex.split(tests)], cwd=Path(folder, 'tests'),
            env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode in (0, 1):
        return ('missed', 'caught')[done.returncode], ''
    said = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return 'error', f'; pytest ended with status {done.returncode}: {"".join(said)}'


def main(word: str = '') -> None:
    """Judge the rows that hold `word`. The exit status is 1 unless all of them are caught."""
    counts: Counter[str] = Counter()
    for file, text, other, tests in (row for row in ROWS if word in ' '.join(row)):
        result, reason = judge(file, text, other, tests)
        counts[result] += 1
        fault = ' '.join(f'{text} -> {other}'.split())
        print(f'{result} {file}: {fault} ({tests}){reason}', flush=True)
    print(', '.join(f'{n} {result}' for result, n in counts.items()) or 'no row holds that word')
    sys.exit(counts.keys() != {'caught'})


# The file, the text in it, what replaces the text, and the tests that must notice
ROWS = [
    # Values on their way from a script into training
    ('train.py', 'net = model.create(arch, size, pretrained, weights)',
     'net = model.create(arch, size)', 'test_recipe.py -k local_weights'),
    ('train.py', 'net = model.create(arch, size, pretrained, weights)',
     'net = model.create(arch, size, False, weights)', 'test_recipe.py -k local_weights'),
    ('train.py', 'tfms = batch_tfms(mean, std, cutout)', 'tfms = batch_tfms(mean, std)',
     'test_recipe.py -k cutout'),
    ('train.py', 'wd=wd', 'wd=0.1', 'test_learner.py -k adamw'),
    ('train.py', 'div_final=div, cbs=cbs', 'div_final=div, moms=(0.95,) * 3, cbs=cbs',
     'test_learner.py -k one_cycle'),
    ('train.py', 'held_out = table[table.fold != k], table[table.fold == k]',
     'held_out = table[table.fold != k], table[table.fold != k]',
     'test_recipe.py -k monitored'),
    ('train.py', 'seed_all(seed, k)', 'seed_all(k)', 'test_learner.py -k depends_on_its_seed'),
    ('train.py', 'train.target, neg_ratio, seed,', 'train.target, neg_ratio, 0,',
     'test_learner.py -k depends_on_its_seed'),
    ('train.py', 'SeedEpoch(seed, k)', 'SeedEpoch(0, k)', 'test_learner.py -k depends_on_its_seed'),
    ('train.py', 'pred_plain=pred)', 'pred_plain=pred[::-1])',
     'test_chain.py -k every_image_is_scored'),
    ('lib/sampling.py', 'np.random.default_rng([self.seed, epoch, 1]).permutation(rows)',
     'np.asarray(rows)', 'test_recipe.py -k new_benign'),
    ('lib/sampling.py', 'self.set_epoch(self.loader, self.epoch)', 'pass',
     'test_recipe.py -k new_benign'),
    ('lib/sampling.py', 'row[len(row) - carried :]', 'row[:0]', 'test_sampling.py'),
    ('lib/sampling.py', 'self.k, self.seed, epoch)', 'self.k, 0, epoch)', 'test_sampling.py'),
    ('lib/callbacks.py', 'if not math.isfinite(known):', 'if math.isnan(known):',
     'test_recipe.py -k not_finite'),
    ('lib/callbacks.py', 'seed_all(self.seed, self.fold,', 'seed_all(0, self.fold,',
     'test_learner.py -k each_process'),
    ('lib/callbacks.py', 'seed_all(self.seed, self.fold,', 'seed_all(self.seed,',
     'test_learner.py -k each_process'),
    ('lib/callbacks.py', '*([ranks.RANK] if ranks.RANK else [])', '',
     'test_learner.py -k each_process'),
    ('lib/callbacks.py', "sum(row['seconds'] for row in self.rows)", "self.rows[-1]['seconds']",
     'test_learner.py -k epochs_line'),
    ('lib/data.py', 'benign.sample(n, random_state=0)', 'benign.head(n)',
     'test_data.py -k monitored'),
    ('lib/devices.py', "int(os.environ.get('LOCAL_RANK', 0))", '0', 'test_devices.py'),
    ('lib/augment.py', 'translate=(0.02, 0.02), p=1.0',
     "translate=(0.02, 0.02), p=1.0, padding_mode='reflection'", 'test_augment.py'),
    ('lib/augment.py', 'translate=(0.02, 0.02), p=1.0',
     "translate=(0.02, 0.02), p=1.0, resample='nearest'", 'test_augment.py'),
    ('lib/augment.py', 'ratio=(0.3, 3.3)', 'ratio=(1, 1)', 'test_augment.py'),
    ('lib/pictures.py', "'malignant' if y[i] else 'benign'", "'benign' if y[i] else 'malignant'",
     'test_recipe.py -k names_of_its_classes'),
    ('lib/pictures.py', 'history.train_loss, color', 'history.valid_loss, color',
     'test_recipe.py -k curves'),

    # From the tables and images
    ('folds.py', 'splits.join_groups(table, duplicates)', 'splits.join_groups(table)',
     'test_splits.py -k checked_alone'),
    ('lib/splits.py', 'table.source.astype(object) + ', '', 'test_splits.py'),
    ('lib/splits.py', 'np.argsort(shuffled)[codes]', 'shuffled[codes]', 'test_splits.py'),
    ('lib/splits.py', "['patient_id', 'lesion_id', 'image_name']",
     "['lesion_id', 'patient_id', 'image_name']", 'test_splits.py -k never_in_two'),
    ('lib/splits.py', "f'{column.name} ' + column", "'' + column", 'test_splits.py -k no_lesion'),
    ('lib/splits.py', 'fold = number.where(number >= 0)', 'fold = number',
     'test_isic2024.py -k may_say'),
    ('lib/tables.py', "'source', 'group', 'target', 'fold']]\n", "'source', 'target', 'fold']]\n",
     'test_tables.py -k hash'),
    ('lib/tables.py', 'table.fold.between(0, 999)', 'table.fold.between(-1, 999)',
     'test_tables.py'),
    ('lib/archives.py', "test.set_index('image_name').loc[order].reset_index()", 'test',
     'test_archives.py'),
    ('lib/layouts.py', "'DF', 'VASC', 'SCC', 'UNK'", "'DF', 'VASC', 'UNK'", 'test_archives.py'),
    ('lib/layouts.py', "'anatom_site': ['localization', ", "'anatom_site': [",
     'test_archives.py -k language'),
    ('lib/layouts.py', "test=['test-metadata.csv'], leaks=True", "test=['test-metadata.csv']",
     'test_isic2024.py -k tells_the_answer'),
    ('lib/demo.py', 'draw(rng, target)).save', 'draw(rng, 0)).save', 'test_chain.py -k kaggles'),
    ('lib/images.py', 'image.getexif().get(ExifTags.Base.Orientation, 1) == 1', 'True',
     'test_images.py'),
    ('lib/images.py', '            image.load()\n            return', '            return',
     'test_images.py -k cut_off'),
    ('lib/images.py', "home / 'cache' / str(size)", "home / 'cache'", 'test_images.py'),
    ('lib/images.py', 'quality=95', 'quality=75', 'test_images.py'),
    ('lib/images.py', '(image.width - side) // 2, (image.height - side) // 2', '0, 0',
     'test_images.py'),
    ('lib/images.py', '1.9 * size', '1.0 * size', 'test_images.py'),
    ('lib/images.py', 'int(stat.st_mtime) + stat.st_size', 'int(stat.st_mtime)', 'test_images.py'),

    # Runs and their files, other processes, the command line
    ('lib/runs.py', "(self.folder / 'scores.json').unlink(missing_ok=True)", 'pass',
     'test_runs.py'),
    ('lib/runs.py', 'for k in saved | now if', 'for k in saved if', 'test_runs.py'),
    ('lib/runs.py', "path, dtype={'image_name': str}, **EXACT)", 'path)', 'test_runs.py'),
    ('lib/cli.py', "f'--{flag}' if value else f'--no{flag}'", "f'--{flag}'",
     'test_chain.py -k one_fold_alone'),
    ('README.md', '--home data/demo --n_tta 5', '--home data/demo --n_passes 5',
     'test_cli.py -k readme'),
    ('lib/files.py', 'os.fsync(f.fileno())', 'pass', 'test_files.py'),
    ('lib/files.py', "hashlib.file_digest(f, 'sha256')", 'hashlib.sha256(f.read(64))',
     'test_files.py'),
    ('lib/locks.py', 'yield piece\n                        break\n', 'yield piece\n',
     'test_locks.py -k "asked or becomes"'),
    ('lib/locks.py', 'if is_mine and not is_done(piece):', 'if is_mine:',
     'test_locks.py -k before_the_lock'),
    ('lib/follow.py', 'self.history.rows[self.step :]', 'self.history.rows[-1:]',
     'test_follow.py -k one_curve'),
    ('lib/ranks.py', "'WORLD_SIZE': str(WORLD)", "'WORLD_SIZE': '1'",
     'test_ranks.py -k launchers_place'),

    # Predictions
    ('infer.py', 'SeedBatch([seed, *part.seeds])', 'SeedBatch([0, *part.seeds])',
     'test_tta.py -k more_passes'),
    ('infer.py', 'net.compile()', 'net.compile(1)', 'test_tta.py -k compiled'),
    ('infer.py', "batch_tfms(config['mean'], config['std'], config['cutout'])",
     "batch_tfms(config['mean'], config['std'])", 'test_tta.py -k bit_for_bit'),
    ('infer.py', 'fitted.curve(rows.pred.to_numpy())', 'fitted.curve(rows.pred_plain.to_numpy())',
     'test_chain.py -k by_one_constant'),
    ('lib/external.py', 'fitted.curve(table.pred.to_numpy())', 'table.pred',
     'test_external.py -k thresholds_prob'),
    ('lib/tta.py', 'self.n_begun, 0', 'self.n_begun, self.seed_batch.n_batch',
     'test_tta.py -k bit_for_bit'),
    ('lib/parts.py', ".digest()[:8]), self.k", ".digest()[:8]), 0", 'test_draws.py'),
    ('lib/parts.py', '_ = part.weights_sha256', 'pass', 'test_parts.py'),
    ('lib/parts.py', '[PREDS].mean()', '[PREDS].first()', 'test_parts.py'),
    ('lib/parts.py', "if value != 'auto'}", "if value != 'auto' and flag != 'seed'}",
     'test_parts.py'),
    ('lib/parts.py', "('oof.json', 'scores.json')", "('scores.json',)",
     'test_parts.py -k two_kinds'),
    ('lib/heat.py', "select(oof, n).sort_values('fold')", 'select(oof, n)',
     'test_heat.py -k not_seen'),
    ('lib/pictures.py', 'np.where(enlarged > 0,', 'np.where(enlarged < 0,', 'test_heat.py -k red'),

    # Blends
    ('blend.py', "platt=calibrate == 'platt'", 'platt=False', 'test_blending.py -k platt'),
    ('blend.py', 'calibration.calibrate(oof, prior,', 'calibration.calibrate(oof, None,',
     'test_blending.py -k platt'),
    ('blend.py', 'blending.weigh(how, scaled, weights))\n\n',
     'blending.weigh(how, scaled, [1 / len(names)] * len(names)))\n\n',
     'test_blending.py -k greedy_submits'),
    ('blend.py', 'names = [run.name for run in runs]', 'names = sorted(run.name for run in runs)',
     'test_blending.py -k stack_submits'),
    ('blend.py', 'oof.assign(fold=oofs.model_folds)', 'oof', 'test_blending.py -k of_their_own'),
    ('lib/blending.py', "'stack': stack_weights", "'stack': None",
     'test_blending.py -k stack_submits'),
    ('lib/blending.py', "solver='newton-cholesky', tol=1e-10, ", '', 'test_blending.py -k stack'),
    ('lib/blending.py', "if how == 'greedy' and (n_runs > 10 or n_malignant < 100):", 'if False:',
     'test_blending.py -k greedy_says'),
    ('lib/blending.py', 'np.zeros(preds.shape) if folds is None else folds',
     'np.zeros(preds.shape)', 'test_blending.py -k ranks_are_within'),
    ('lib/blending.py', 'score.compare_paired(oofs.rows.target, preds, k, oofs.rows.group)',
     'score.compare_paired(oofs.rows.target, preds, k, oofs.rows.index)',
     'test_blending.py -k compared_with'),
    ('lib/predictions.py', "    print(*lined_up.leaks, sep", "    0 and print(*lined_up.leaks, sep",
     'test_blending.py -k split_patients'),
    ('lib/predictions.py', 'rows.group.fillna(rows.patient_id)', 'rows.group',
     'test_blending.py -k folds_are_assigned'),
    ('lib/predictions.py', '(folder / name).unlink(missing_ok=True)', 'pass',
     'test_report.py -k shorter'),

    # Scores and probabilities
    ('lib/score.py', '[2.5, 97.5]', '[5, 95]', 'test_score.py -k intervals_hold'),
    ('lib/score.py', 'N_DRAWS = 1000', 'N_DRAWS = 100', 'test_score.py -k intervals_hold'),
    ('lib/score.py', 'p = 2 * t.sf(', 'p = t.sf(', 'test_score.py -k p_is_uniform'),
    ('lib/score.py', 'draws = bootstrap(target, preds, group)[:, :, 0]',
     'draws = bootstrap(target, preds, np.arange(len(target)))[:, :, 0]',
     'test_score.py -k comparison'),
    ('lib/score.py', 'width = spread * t.ppf(0.975, n_groups - 1)\n                low',
     'width = spread * 1.96\n                low', 'test_score.py -k two_runs'),
    ('lib/score.py', "(halves | {'spec_at_sens_95': 0.5 / (1 - target).sum()}).items()",
     "{'auc': 0.5 / n_pairs}.items()", 'test_score.py -k partial'),
    ('lib/score.py', ' or np.nanstd(draws) == 0', '', 'test_score.py -k "two_runs or no_interval"'),
    ('lib/score.py', 'if n_groups < 2:', 'if n_groups < 1:', 'test_score.py -k no_interval'),
    ('lib/summary.py', "rows += [label_rows(measured, 'main', f'{WITHIN}{source}')]",
     "rows += [label_rows(measured.assign(images=len(oof)), 'main', f'{WITHIN}{source}')]",
     'test_summary.py'),
    ('lib/summary.py', 'score.rank_within_folds(oof[pred], oof.fold)',
     'score.rank_within_folds(oof.pred, oof.fold)', 'test_summary.py'),
    ('lib/summary.py', 'oof.assign(pred=oof[pred]), [', 'oof, [', 'test_summary.py test_export.py'),
    ('lib/summary.py', 'oof.pred.to_numpy(), SENSITIVITY)', 'oof.pred.to_numpy(), 0.5)',
     'test_summary.py -k small_subgroups'),
    ('lib/summary.py', 'both, 1, oof.group)', 'both, 1, oof.index)', 'test_summary.py'),
    ('lib/shortcuts.py', "table.get('patient_id', table.group).fillna(table.group)",
     "table.get('patient_id', table.group)", 'test_shortcuts.py'),
    ('lib/shortcuts.py', '    if not seen:', '    if False:', 'test_shortcuts.py'),
    ('lib/calibration.py', '= fit(own, prior)', '= fit(own | True, prior)',
     'test_calibration.py -k no_other_source'),
    ('lib/calibration.py', 'fit(others, rate)(pred[fold == k])', 'curve(pred[fold == k])',
     'test_calibration.py'),
    ('lib/calibration.py', 'malignant_rate(oof, prior), evaluation_rows(oof)',
     "malignant_rate(oof, prior), (np.full(len(oof), True), 'all')", 'test_calibration.py'),
    ('lib/calibration.py', 'if slope is not None and not 0.2 <= slope <= 5:', 'if False:',
     'test_calibration.py'),
    ('lib/calibration.py', 'newton.fit(x[:, None], target, weight)',
     'newton.fit(x[:, None], target)', 'test_calibration.py'),
    ('lib/calibration.py', 'weights=bins.weight', 'weights=None', 'test_calibration.py'),
    ('lib/thresholds.py', '(pred[target == 0] < at[:, None])', '(pred[target == 0] >= at[:, None])',
     'test_thresholds.py'),
    ('lib/thresholds.py', "'{:.0f} % sensitivity wanted'", "'{:.0f} % sensitivity'",
     'test_thresholds.py'),
    ('lib/thresholds.py', 'int(np.ceil(', 'int(np.floor(', 'test_thresholds.py'),

    # What is shown: the report, its figures, the card
    ('lib/report.py', "{'blend': scores.rows, 'shortcut floor': scores.floor}",
     "{'blend': scores.floor, 'shortcut floor': scores.rows}", 'test_report.py -k columns'),
    ('lib/report.py', "{'blend': scores.rows, 'shortcut floor': scores.floor}",
     "{'blend': scores.rows, 'shortcut floor': scores.rows}", 'test_report.py -k columns'),
    ('lib/report.py', 'own = oof[calibration.evaluation_rows(oof)[0]]', 'own = oof',
     'test_report.py -k sheets'),
    ('lib/figures.py', "xlabel='false positive rate', ylabel='sensitivity (true positive rate)'",
     "ylabel='false positive rate', xlabel='sensitivity (true positive rate)'", 'test_figures.py'),
    ('lib/figures.py', 'axes.plot(fpr, tpr,', 'axes.plot(tpr, fpr,', 'test_figures.py'),
    ('lib/figures.py', 'axes.plot(recall, precision,', 'axes.plot(precision, recall,',
     'test_figures.py'),
    ('lib/figures.py', 'axes.set_yticks(places, names', 'axes.set_yticks(places[::-1], names',
     'test_figures.py'),
    ('lib/figures.py', '[2.5, 97.5]', '[25, 75]', 'test_figures.py'),
    ('lib/figures.py', 'resample(group, N_BAND_DRAWS, seed=0)',
     'resample(np.arange(len(group)), N_BAND_DRAWS, seed=0)', 'test_figures.py'),
    ('lib/figures.py', 'axes.plot(of_name.predicted, of_name.observed,',
     'axes.plot(of_name.observed, of_name.predicted,', 'test_figures.py'),
    ('lib/export.py', 'tabulate_thresholds(fitted.thresholds)',
     "tabulate_thresholds(fitted.thresholds.rename(columns={'true_positives': 'false_negatives',"
     " 'false_negatives': 'true_positives'}))", 'test_export.py -k thresholds'),
    ('lib/export.py', 'calibration.calibrate(oof.assign(pred=oof.pred_plain), prior)',
     'calibration.calibrate(oof, prior)', 'test_export.py -k thresholds'),
    ('lib/export.py', "'crop_pct': 1.0", "'crop_pct': 0.875", 'test_export.py -k timm_loads'),
    ('lib/export.py', "groups=('group', 'nunique')", "groups=('group', 'size')",
     'test_export.py -k scored_apart'),
    # What people bring, and what changes under a run
    ('lib/tables.py', ' & cells.duplicated(keep=False)', '', 'test_tables.py -k empty_cell'),
    ('lib/tables.py', "unicodedata.normalize('NFC', SUFFIX", '(SUFFIX',
     'test_archives.py -k decomposed'),
    ('lib/tables.py', "cells.str.strip()", 'cells', 'test_tables.py -k empty_cell'),
    ('lib/tables.py', "str(cell).rstrip('+')", 'str(cell)', 'test_tables.py -k sex_and_age'),
    ('lib/tables.py', 'if len(lost):', 'if False:', 'test_tables.py -k sex_and_age'),
    ('lib/archives.py', '[there.index.isin(rows.file)]', '', 'test_archives.py -k two_files'),
    ('lib/archives.py', 'return pairs.dropna()', 'return pairs', 'test_archives.py -k pair'),
    ('lib/splits.py', 'sizes > len(group) / 10', 'sizes > len(group) / 2',
     'test_splits.py -k point_zero'),
    ('lib/splits.py', 'if ids[used].isna().all(axis=None):', 'if False:',
     'test_splits.py -k reassures'),
    ('lib/images.py', "b'\\x55' * 4096 + ", '', 'test_images.py -k end_marker'),
    ('lib/images.py', 'MAX_TEXT_CHUNK = 2**26', 'MAX_TEXT_CHUNK = 2**20',
     'test_images.py -k metadata'),
    ('lib/parts.py', 'return saved if all(', 'return settings if all(',
     'test_parts.py -k keeps_its_settings'),
    ('lib/parts.py', 'return words + ([] if is_of(self.path, self.rows) else',
     'return words + ([] if True else', 'test_parts.py -k other_test'),
    ('lib/parts.py', 'if k not in NOTES}', "if k != 'command'}", 'test_draws.py'),
    ('lib/runs.py', 'k not in NOTES]', "k != 'command']", 'test_runs.py -k words_may_change'),
    ('lib/runs.py', 'node.body = node.body[1:]', 'pass',
     'test_runs.py -k words_may_change'),
    ('lib/runs.py', 'saved not in (None, files.sha256(self.weights(k)))', 'False',
     'test_runs.py -k exchanged'),
    ('lib/model.py', 'model.eval()(torch.zeros(1, 3, size, size))', 'pass',
     'test_model.py -k cannot_take'),
    ('lib/model.py', '.{old["tag"]}', '', 'test_model.py -k maps_it_to'),
    ('lib/sampling.py', '(n_positive + self.k) // batch_size', '(n_positive + self.k) // 2 // 2',
     'test_sampling.py -k no_epoch_fills'),
    ('lib/callbacks.py', 'last > max(first, math.log(2))', 'last > first',
     'test_learner.py -k above_its_start'),
    ('lib/predictions.py', '    for name in (\'oof.csv\', \'test.csv\'):\n        (folder',
     '    for name in ():\n        (folder', 'test_blending.py -k two_blends'),
    ('blend.py', 'if mix and names != list(by_hand):', 'if False:', 'test_chain.py -k unless_a'),
    # One's own images, and somebody else's
    ('lib/tables.py', "dict.fromkeys(negative, '0')", "dict.fromkeys(negative, '1')",
     'test_archives.py -k clinics'),
    ('lib/tables.py', 'and not labels.negative]', 'and False]', 'test_archives.py -k clinics'),
    ('lib/layouts.py', "'image_type': ['dermoscopic']", "'image_type': ['clinical: close-up']",
     'test_archives.py -k isic_archive'),
    ('lib/layouts.py', "unclear=['malignant', ", 'unclear=[',
     'test_archives.py -k isic_archive'),
    ('lib/versions.py', 'if wrong := find_wrong(FILE):', 'if wrong := []:', 'test_versions.py'),
    ('lib/devices.py', 'if 1 < ranks', 'if 99 < ranks',
     'test_devices.py -k more_processes'),
    ('lib/archives.py', "MADE = ('cache', 'runs', 'report', 'unpacked')", 'MADE = ()',
     'test_archives.py -k are_enough'),
    ('lib/archives.py', 'if own or layout.named else', 'if True else',
     'test_archives.py -k challenge'),
    ('lib/home.py', 'and (n_folds, seed) == (5, 0)', 'and False', 'test_archives.py -k are_kept'),
    ('lib/external.py', 'rows.is_known | (ids.isin(seen)', '(ids.isin(seen)',
     'test_external.py -k left_out'),
    ('lib/external.py', '| (ids.isin(seen) & ids.str.fullmatch(ISIC_ID))', '',
     'test_external.py -k left_out'),
    ('lib/external.py', 'oofs.preds.mean(axis=1)', 'oofs.preds[:, 0]',
     'test_external.py -k thresholds_prob'),
    ('lib/external.py', 'one.value - other.value', 'other.value - one.value',
     'test_external.py -k two_aucs'),
    ('lib/archives.py', ' if path.parent == folder}', '}', 'test_archives.py -k nothing_of'),
    ('lib/archives.py', 'if not own and source in tables.COMPETITIONS:', 'if False:',
     'test_archives.py -k changes_no_target'),
    ('lib/external.py', "left & ends.isin(rows.file)", 'ends.isin(rows.file)',
     'test_external.py -k matched_by_path'),
    ('lib/thresholds.py', '>= at.pred', '<= at.pred', 'test_external.py -k thresholds_prob'),
    ('lib/thresholds.py', 'score.resample(rows.group,', 'score.resample(rows.index,',
     'test_external.py -k at_a_threshold'),
    ('lib/external.py', '!= (n_tta, weights)', "!= (record.get('n_tta'), weights)",
     'test_external.py -k command_is_named'),
    ('lib/export.py', "'CC-BY': 'cc-by-4.0'", "'CC-BY': 'cc0-1.0'", 'test_export.py -k strictest'),
    ('lib/predictions.py', 'if not self.has_folds:', 'if False:',
     'test_blending.py -k are_assigned'),
    ('lib/archives.py', 'isin(ids) | table_names.isin(ids)', 'isin(ids)',
     'test_archives.py -k end_alike'),
    ('lib/archives.py', ' | ends.isin(taken)', '', 'test_archives.py -k end_alike'),
    ('infer.py', 'if heat and prior is None else', 'if False else', 'test_heat.py -k highest'),
    ('lib/external.py', '(joined := join_labels(table, labelled)).empty',
     '(joined := join_labels(table, labelled)) is None', 'test_external.py -k command_is_named'),
]  # fmt: skip


if __name__ == '__main__':
    main(*sys.argv[1:2])
