"""What a run's out-of-fold predictions are worth: printed, and kept in its scores.json."""

import pandas as pd

from lib import files, locks, score, summary
from lib.runs import Run


def report(run: Run, oof: pd.DataFrame, columns: list[str]) -> None:
    """Score the `columns` of `oof` (target, group, source, fold, ...): `pred_plain`, `pred`."""
    print(f'{run}: out of fold [95 % interval over {summary.resampling_unit(oof)}]')
    scores = {column: summary.summarize(oof, column) for column in columns}
    print(summary.format_summaries(scores))
    if len(columns) > 1:
        both = [oof.pred, oof.pred_plain]
        scores['tta'] = score.compare_paired(oof.target, both, 1, oof.group)[1][0]
        print(f'test-time augmentation changes the AUC by {scores["tta"]}')
    with locks.held(run.lock):
        files.write_json(run.folder / 'scores.json', scores)
