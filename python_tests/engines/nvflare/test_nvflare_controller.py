"""The controller's options, before any job runs; whole jobs are in test_nvflare_jobs.py."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare")

from nvflare.fuel.utils.class_utils import instantiate_class

from fastagg import Aggregator, InvalidInput
from fastagg.engines.nvflare import FastAggController, FastAggRecipe


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "none"}, "method"),
        ({"ranks": {"site-1": 4}}, "initial"),
        ({"ranks": "ask"}, "initial"),
        ({"ranks": "tell", "initial": "x"}, "ranks"),
        ({"min_clients": 0}, "min_clients"),
        ({"attempts": True}, "attempts"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_wrong_options_are_refused_before_the_job(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        FastAggController(num_rounds=1, **options)


def test_every_option_of_the_aggregator_is_there() -> None:
    own = inspect.signature(FastAggController).parameters
    options = dict(inspect.signature(Aggregator).parameters)
    del options["process_group"]  # a server of NVFlare's is one process
    for name, parameter in options.items():
        assert own[name].default == parameter.default


def test_an_exported_job_holds_every_argument(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text("print('a client')")
    options: dict[str, Any] = {
        "num_rounds": 3,
        "num_clients": 4,
        "min_clients": 2,
        "timeout": 60,
        "initial": str(tmp_path / "first"),
        "ranks": {"site-1": 4, "site-2": 16},
        "folder": str(tmp_path / "rounds"),
        "resume": True,
        "weight_field": "num_examples",
        "enable_tensor_disk_offload": True,
        "method": "hetlora",
        "max_memory": "2GiB",
        "dtype": "bfloat16",
    }
    recipe = FastAggRecipe(name="exported", train_script=str(script), **options)
    recipe.export(str(tmp_path / "job"))
    (file,) = (tmp_path / "job").rglob("config_fed_server.json")
    (written,) = json.loads(file.read_text())["workflows"]
    made = instantiate_class(written["path"], written["args"])
    given = FastAggController(**options)
    for name in inspect.signature(FastAggController).parameters:
        assert getattr(made, name) == getattr(given, name)
    # FastAgg itself is installed on the sites: no copy of it goes with the job.
    assert not [path for path in (tmp_path / "job").rglob("*") if "fastagg" in path.name]
    (client,) = (tmp_path / "job").rglob("config_fed_client.json")
    (executor,) = json.loads(client.read_text())["executors"]
    assert executor["executor"]["args"]["server_expected_format"] == "pytorch"


def test_sites_may_have_arguments_of_their_own(tmp_path: Path) -> None:
    from nvflare.recipe import set_per_site_config

    script = tmp_path / "client.py"
    script.write_text("print('a client')")
    recipe = FastAggRecipe(train_script=str(script), num_rounds=1, train_args="--rank 4")
    set_per_site_config(recipe, {"site-1": {"train_args": "--rank 16"}, "site-2": {}})
    recipe.export(str(tmp_path / "job"))
    found = {}
    for file in (tmp_path / "job").rglob("config_fed_client.json"):
        (executor,) = json.loads(file.read_text())["executors"]
        found[file.parents[1].name] = executor["executor"]["args"]["task_script_args"]
    assert found == {"app_site-1": "--rank 16", "app_site-2": "--rank 4"}
    with pytest.raises(InvalidInput, match=r"site-1.*'rank'"):
        set_per_site_config(
            FastAggRecipe(train_script=str(script), num_rounds=1), {"site-1": {"rank": 16}}
        )
