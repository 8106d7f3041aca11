"""The layouts of public data sets, one row each, and the words that they use; nothing but data.

A new data set is a row of LAYOUTS; lib/archives.py reads them all in one way.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table of a layout."""

    names: Sequence[str]  # its possible paths in the set's folder; the first that exists is read
    columns: Sequence[str]  # those that it must have; the first is the image's name


class Layout(NamedTuple):
    """A set of images. The column of the target, and of the diagnosis, is the one that NAMES calls
    so; where a set has none, `malignant` and `classes` say how it is made.
    """

    source: str  # its name in folds.csv, and that of its folder under DATA/external
    labels: Table
    images: Sequence[str]  # its folders, of which some may be missing; {split} is train or test
    metadata: Table | None = None  # a second table, of which only these columns are read
    malignant: Sequence[str] = ()  # the diagnoses with a target of 1
    classes: Sequence[str] = ()  # columns of 0 and 1; that of the 1 names the diagnosis
    no_class: str = 'unknown'  # the diagnosis where all of them are 0
    test: str | None = None  # a competition's table of test images: these columns less the target
    leaks: bool = False  # other columns tell the answer, so only those named here are read


PERSON = ['image_name', 'patient_id', 'sex', 'age_approx']
SIIM = [*PERSON, 'anatom_site_general_challenge', 'target']

LAYOUTS = {
    layout.source: layout
    for layout in (
        # https://www.kaggle.com/c/siim-isic-melanoma-classification/data, or a resized copy
        Layout(
            'competition', Table(['train.csv'], SIIM), ['{split}', 'jpeg/{split}'],
            test='test.csv',
        ),
        # https://www.kaggle.com/competitions/isic-2024-challenge/data; what leaks are iddx_*, mel_*
        # and tbp_lv_dnn_lesion_confidence
        Layout(
            'isic2024',
            Table(['train-metadata.csv'], [*PERSON, 'anatom_site_general', 'target']),
            ['{split}-image/image'], test='test-metadata.csv', leaks=True,
        ),
        # https://challenge.isic-archive.com/data/#2019
        Layout(
            'isic2019',
            Table(['ISIC_2019_Training_GroundTruth.csv'], ['image', 'MEL', 'NV']),
            ['ISIC_2019_Training_Input', 'ISIC_2019_Training_Input/ISIC_2019_Training_Input'],
            Table(['ISIC_2019_Training_Metadata.csv'],
                  ['image', 'age_approx', 'anatom_site_general', 'lesion_id', 'sex']),
            classes=['MEL', 'NV', 'BCC', 'AK', 'BKL', 'DF', 'VASC', 'SCC', 'UNK'],
        ),
        # Part 3 of https://challenge.isic-archive.com/data/#2017, which has the second table among
        # the images
        Layout(
            'isic2017',
            Table(['ISIC-2017_Training_Part3_GroundTruth.csv'],
                  ['image_id', 'melanoma', 'seborrheic_keratosis']),
            ['ISIC-2017_Training_Data'],
            Table(['ISIC-2017_Training_Data_metadata.csv',
                   'ISIC-2017_Training_Data/ISIC-2017_Training_Data_metadata.csv'],
                  ['image_id', 'age_approximate', 'sex']),
            classes=['melanoma', 'seborrheic_keratosis'], no_class='nevus',
        ),
        # https://doi.org/10.7910/DVN/DBW86T, which offers a .tab first: read_csv says what to do
        Layout(
            'ham10000',
            Table(['HAM10000_metadata.csv', 'HAM10000_metadata', 'HAM10000_metadata.tab'],
                  ['image_id', 'lesion_id', 'dx', 'age', 'sex', 'localization']),
            ['HAM10000_images_part_1', 'HAM10000_images_part_2', 'ISIC2018_Task3_Training_Input'],
            malignant=['mel'],
        ),
        # The training images of the first row, beside a later competition
        Layout(
            'isic2020', Table(['train.csv'], [*SIIM, 'diagnosis']), ['train', 'jpeg/train'],
        ),
    )
}  # fmt: skip

SUFFIXES = ('.jpg', '.jpeg', '.png')  # of image files, in lower case
SAMPLE = Table(['sample_submission.csv'], ['image_name', 'target'])
DUPLICATES = Table(
    [f'{folder}ISIC_2020_Training_Duplicates.csv' for folder in ('', 'external/isic2020/')],
    ['image_name_1', 'image_name_2'],
)

# What a cell of a table holds where nothing is known, in lower case
UNKNOWN = ('na', 'n/a', 'nan', 'none', 'null', 'unknown', '<na>', '#n/a')
# What public tables write where a patient is not known. One row with such an id may be a patient
NOBODY = ('-1', '0', '-1.0', '0.0', *UNKNOWN)
# The columns that folds.csv has under another name
NAMES = {
    'image': 'image_name', 'image_id': 'image_name', 'MEL': 'target', 'melanoma': 'target',
    'dx': 'diagnosis', 'age': 'age_approx', 'age_approximate': 'age_approx',
    'localization': 'anatom_site', 'anatom_site_general': 'anatom_site',
    'anatom_site_general_challenge': 'anatom_site',
}  # fmt: skip
# The archives abbreviate diagnoses; a diagnosis that is not listed keeps its name
DIAGNOSES = {
    'mel': 'melanoma', 'nv': 'nevus', 'bcc': 'basal cell carcinoma', 'ak': 'actinic keratosis',
    'akiec': 'actinic keratosis', 'bkl': 'benign keratosis', 'df': 'dermatofibroma',
    'vasc': 'vascular lesion', 'scc': 'squamous cell carcinoma', 'unk': 'unknown',
    'seborrheic_keratosis': 'seborrheic keratosis',
}  # fmt: skip
SEXES = {'m': 'male', 'f': 'female', 'man': 'male', 'woman': 'female'}
# The competition's names for the sites; a site that is not listed keeps its name
SITES = {
    'anterior torso': 'torso', 'posterior torso': 'torso', 'lateral torso': 'torso',
    'abdomen': 'torso', 'back': 'torso', 'chest': 'torso', 'trunk': 'torso',
    'face': 'head/neck', 'ear': 'head/neck', 'neck': 'head/neck', 'scalp': 'head/neck',
    'foot': 'lower extremity', 'hand': 'upper extremity', 'acral': 'palms/soles',
    'genital': 'oral/genital', 'unknown': None,
}  # fmt: skip
