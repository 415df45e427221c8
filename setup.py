"""Packages of the wheel: yamls/ and data_prep/, which lie beside the package here, are inside it there.

All else is in pyproject.toml, which cannot add folders to those that setuptools finds.
"""

from setuptools import find_packages, setup

BESIDE = {"electra_composer.yamls": "yamls", "electra_composer.data_prep": "data_prep"}

setup(
    packages=[*find_packages(include=["electra_composer", "electra_composer.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={"electra_composer.yamls": ["*.yaml", "schema.json"], "electra_composer.reports": ["page.*"]},
)
