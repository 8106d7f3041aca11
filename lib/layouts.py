"""The layouts of public data sets, one row each, and the words that they use; nothing but data.

A new data set is a row of LAYOUTS; lib/archives.py reads them all in one way.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table of a layout."""

    names: Sequence[str]  # of its file, which lies anywhere below the set's folder
    columns: Sequence[str]  # those that it must have; the first is the image's name
    optional: bool = False  # whether it may be missing


class Layout(NamedTuple):
    """A set of images, recognised by its table of labels. Its images lie anywhere below its folder.
    Where it has no column of the target, or of the diagnosis, `malignant` and `classes` make one.
    """

    source: str  # its name in folds.csv
    labels: Table
    metadata: Table | None = None  # a second table, of which only these columns are read
    malignant: Sequence[str] = ()  # the values of `judged` with a target of 1; empty cells: none
    unclear: Sequence[str] = ()  # the values of `judged` without a target
    judged: str = 'diagnosis'
    classes: Sequence[str] = ()  # columns of 0 and 1; that of the 1 names the diagnosis
    no_class: str = 'unknown'  # the diagnosis where all of them are 0
    first: Mapping[str, Sequence[str]] = {}  # a column is the first of these that is known
    kept: Mapping[str, Sequence[str]] = {}  # of columns: rows with other values are left out
    test: Sequence[str] = ()  # names of a competition's table of test images
    leaks: bool = False  # other columns tell the answer, so only those named here are read
    named: bool = True  # whether it has this name below external/ too, and not that of its folder


PERSON = ['image_name', 'patient_id', 'sex', 'age_approx']
SIIM = [*PERSON, 'anatom_site_general_challenge', 'target']

LAYOUTS = (
    # https://www.kaggle.com/c/siim-isic-melanoma-classification/data, or a resized copy of it or of
    # ISIC 2019, and https://challenge.isic-archive.com/data/#2020
    Layout(
        'competition', Table(['train.csv'], SIIM), test=['test.csv'], named=False,
    ),
    Layout(
        'competition',
        Table(['ISIC_2020_Training_GroundTruth_v2.csv', 'ISIC_2020_Training_GroundTruth.csv'],
              SIIM),
        test=['ISIC_2020_Test_Metadata.csv'], named=False,
    ),
    # https://www.kaggle.com/competitions/isic-2024-challenge/data; what leaks are iddx_*, mel_* and
    # tbp_lv_dnn_lesion_confidence
    Layout(
        'isic2024', Table(['train-metadata.csv'], [*PERSON, 'anatom_site_general', 'target']),
        test=['test-metadata.csv'], leaks=True,
    ),
    # https://challenge.isic-archive.com/data/#2019
    Layout(
        'isic2019', Table(['ISIC_2019_Training_GroundTruth.csv'], ['image', 'MEL', 'NV']),
        Table(['ISIC_2019_Training_Metadata.csv'],
              ['image', 'age_approx', 'anatom_site_general', 'lesion_id', 'sex']),
        classes=['MEL', 'NV', 'BCC', 'AK', 'BKL', 'DF', 'VASC', 'SCC', 'UNK'], malignant=['MEL'],
    ),
    # Part 3 of https://challenge.isic-archive.com/data/#2017
    Layout(
        'isic2017',
        Table(['ISIC-2017_Training_Part3_GroundTruth.csv'],
              ['image_id', 'melanoma', 'seborrheic_keratosis']),
        Table(['ISIC-2017_Training_Data_metadata.csv'], ['image_id', 'age_approximate', 'sex']),
        classes=['melanoma', 'seborrheic_keratosis'], no_class='nevus', malignant=['melanoma'],
    ),
    # https://doi.org/10.7910/DVN/DBW86T, which offers a .tab first: read_csv says what to do
    Layout(
        'ham10000',
        Table(['HAM10000_metadata.csv', 'HAM10000_metadata', 'HAM10000_metadata.tab'],
              ['image_id', 'lesion_id', 'dx', 'age', 'sex', 'localization']),
        malignant=['mel'],
    ),
    # Task 3 of https://challenge.isic-archive.com/data/#2018, which is HAM10000
    Layout(
        'ham10000', Table(['ISIC2018_Task3_Training_GroundTruth.csv'], ['image', 'MEL', 'NV']),
        Table(['ISIC2018_Task3_Training_LesionGroupings.csv'], ['image', 'lesion_id'], True),
        classes=['MEL', 'NV', 'BCC', 'AKIEC', 'BKL', 'DF', 'VASC'], malignant=['MEL'],
    ),
    # The ISIC archive: `isic image download`, or a snapshot. Close-ups and images without a clear
    # diagnosis are left out. A collision with a melanoma counts as one, by the archive's own rule.
    # Source: https://github.com/ImageMarkup/isic-cli
    Layout(
        'archive', Table(['metadata.csv'], ['image_name', 'diagnosis_1', 'diagnosis_2']),
        judged='judged', unclear=['malignant', 'indeterminate'],
        malignant=['malignant melanocytic proliferations (melanoma)',
                   'collision - at least one malignant proliferation'],
        first={'judged': ['diagnosis_2', 'diagnosis_1'],
               'diagnosis': ['diagnosis_3', 'diagnosis_2', 'diagnosis_1'],
               'anatom_site': ['anatom_site', 'anatom_site_2', 'anatom_site_1']},
        kept={'diagnosis_1': ['Benign', 'Malignant'], 'image_type': ['dermoscopic']},
        named=False,
    ),
    # One's own images: any other columns of NAMES are read too
    Layout(
        'own', Table(['train.csv'], ['image_name']), test=['test.csv'], named=False,
    ),
)  # fmt: skip

# Suffixes of image files, in lower case
SUFFIXES = ('.jpg', '.jpeg', '.jfif', '.png', '.bmp', '.tif', '.tiff', '.webp')
SAMPLE = Table(['sample_submission.csv'], ['image_name', 'target'])
DUPLICATES = Table(['ISIC_2020_Training_Duplicates.csv'], ['image_name_1', 'image_name_2'])

# What a cell of a table holds where nothing is known, in lower case
UNKNOWN = ('na', 'n/a', 'nan', 'none', 'null', 'unknown', '<na>', '#n/a')
# What public tables write where a patient is not known. One row with such an id may be a patient
NOBODY = ('-1', '0', '-1.0', '0.0', *UNKNOWN)
# The columns of folds.csv, and what others call them, in lower case
NAMES = {
    'image_name': ['image', 'image_id', 'isic_id', 'img_id', 'filename', 'file_name', 'ddi_file'],
    'patient_id': ['patient'],
    'lesion_id': ['lesion'],
    'diagnosis': ['dx', 'diagnostic', 'disease'],
    'sex': ['gender'],
    'age_approx': ['age', 'age_approximate'],
    'anatom_site': ['localization', 'location', 'region', 'anatom_site_general',
                    'anatom_site_general_challenge'],
    'licence': ['copyright_license', 'license'],
    'skin_tone': ['fitspatrick', 'fitzpatrick', 'fitzpatrick_skin_type', 'skin_tone_class'],
}  # fmt: skip
# The archives abbreviate diagnoses; a diagnosis that is not listed keeps its name
DIAGNOSES = {
    'mel': 'melanoma', 'nv': 'nevus', 'bcc': 'basal cell carcinoma', 'ak': 'actinic keratosis',
    'akiec': 'actinic keratosis', 'bkl': 'benign keratosis', 'df': 'dermatofibroma',
    'vasc': 'vascular lesion', 'scc': 'squamous cell carcinoma', 'unk': 'unknown',
    'seborrheic_keratosis': 'seborrheic keratosis',
}  # fmt: skip
# The values of a target that are plainly 0 where others are named as 1, in lower case
BENIGN = ('0', '0.0', 'false', 'no', 'negative', 'benign', 'nevus', 'naevus', 'nv', 'nev')
SEXES = {'m': 'male', 'f': 'female', 'man': 'male', 'woman': 'female'}
# The competition's names for the sites; a site that is not listed keeps its name
SITES = {
    'anterior torso': 'torso', 'posterior torso': 'torso', 'lateral torso': 'torso',
    'abdomen': 'torso', 'back': 'torso', 'chest': 'torso', 'trunk': 'torso',
    'head and neck': 'head/neck', 'face': 'head/neck', 'ear': 'head/neck', 'neck': 'head/neck',
    'scalp': 'head/neck', 'palms and soles': 'palms/soles', 'oral and genital': 'oral/genital',
    'foot': 'lower extremity', 'hand': 'upper extremity', 'acral': 'palms/soles',
    'genital': 'oral/genital', 'unknown': None,
}  # fmt: skip
