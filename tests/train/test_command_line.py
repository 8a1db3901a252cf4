"""The three command lines: what is misspelt is refused, with the nearest names."""

import importlib
import sys

import pytest

MISSPELT = [
    # the command line, arguments, what is said
    ("train", "clasification", "command 'clasification'; did you mean classification?"),
    ("train", "recipe", "unknown command 'recipe'; did you mean recipes? known: class"),
    ("train", "train", "unknown command 'train'; known: classification, segmentation"),
    ("train.data", "inof", "unknown command 'inof'; did you mean info? known: list, "),
    ("train.data", "inspect x", "unknown command 'inspect'; known: list, prepare"),
    (
        "benchmarks",
        "compar",
        "command 'compar'; did you mean compare or compile? known: ",
    ),
    ("train", "--dataset digits", "name a command before --dataset: classification, "),
    ("train.data", "--name x", "name a command before --name: list, prepare, info"),
    ("benchmarks", "--seeds 3", "name a command before --seeds: compare, pairs, stu"),
    ("train", "classification --epoch 3", "flag --epoch; did you mean --epochs"),
    ("train", "classification --tecniques=sam", "did you mean --techniques?"),
    ("train", "classification --tricks sam", "unknown flag --tricks; `python -m tra"),
    ("train", "classification --lr 0.1", "flag --lr; did you mean --learning-rate?"),
    ("train", "segmentation --wd 0.1", "flag --wd; did you mean --weight-decay?"),
    ("train", "translation --bs=1", "unknown flag --bs; did you mean --batch-size?"),
    ("train", "classification --num_epochs 3", "did you mean --epochs or --warmup-ep"),
    ("train", "classification --output-dir x", "did you mean --data-dir or --run-dir"),
    ("train", "classification --workers 2", "did you mean --num-workers?"),
    ("train", "classification --lr 1 --sed 2", "did you mean --seed or --seeds? `pyt"),
    ("train", "predict a b.png --ouput x", "unknown flag --ouput; did you mean --out"),
    ("train", "export a b", "unexpected argument 'b'; `python -m train export --help`"),
    ("train.data", "prepare x --sorce y", "flag --sorce; did you mean --source? `pyt"),
    ("train.data", "show digits --cout 3", "unknown flag --cout; did you mean --count"),
    ("benchmarks", "transforms --rund-dir x", "did you mean --run-dir? `python -m be"),
]


@pytest.mark.parametrize(("module", "arguments", "message"), MISSPELT)
def test_what_is_misspelt_is_refused(monkeypatch, capsys, module, arguments, message):
    main = importlib.import_module(f"{module}.__main__").main
    monkeypatch.setattr(sys, "argv", [module, *arguments.split()])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
@pytest.mark.parametrize(
    ("module", "commands"),
    [
        ("train.data", ("list", "prepare", "info", "show")),
        (
            "benchmarks",
            (
                *("compare", "pairs", "studies", "speed", "transforms", "input"),
                *("networks", "loop", "compile", "gpu"),
            ),
        ),
    ],
)
def test_the_commands_are_listed(monkeypatch, capsys, module, commands, arguments):
    main = importlib.import_module(f"{module}.__main__").main
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: python -m {module} COMMAND ..."
    shown = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    assert tuple(name for name, _ in shown) == (*commands, "--no-compilation-cache")
    assert all(len(summary) > 20 for _, summary in shown)
