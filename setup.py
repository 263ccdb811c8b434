"""Package neighbor_grpo from `settings.ini`, the file nbdev reads as well."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def read_settings():
    "The settings of the project as a flat mapping of strings."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def read_extras(settings):
    "`dev` from `dev_requirements`, and one extra for every `extra_NAME`."
    extras = {key.removeprefix("extra_"): value.split() for key, value in settings.items() if key.startswith("extra_")}
    return {**extras, "dev": settings["dev_requirements"].split()}


def description(settings):
    "The README for the package index, where a path in the repository leads nowhere."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    def absolute(match):
        folder = "raw" if match[2].endswith((".png", ".webp")) else "blob"
        return f"{match[1]}{settings['git_url']}/{folder}/{settings['branch']}/{match[2]}"

    return re.sub(r'(\]\(|\bsrc="|\bsrcset=")(?![a-z]+:|#)([^)"]+)', absolute, readme)


def classifiers(settings):
    "The trove classifiers of the package index."
    return [
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        *(f"Programming Language :: Python :: {version}" for version in PYTHONS),
    ]


settings = read_settings()
setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=description(settings),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    keywords=settings["keywords"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=classifiers(settings),
    # An explicit pattern: tests/ and tools/ must never be installed into someone's site-packages.
    packages=find_packages(include=[settings["lib_name"], settings["lib_name"] + ".*"]),
    package_data={settings["lib_name"]: ["pretrained/**", "prompts/*", "recipes/*", "texts/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=read_extras(settings),
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        # Lets nbdev find our symbols, here and in projects that link to these pages.
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
