"""Promotion and rollback on real registries: where the aliases point, and what the trail says."""

import getpass
import json
from dataclasses import replace

import pytest
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from flows.cli.app import app
from tasks.environment import Workspace
from tasks.registry.client import open_client
from tasks.registry.gates import GateConfig
from tasks.registry.promotion import AUDIT, PromotionRefusedError, promote, rollback, trail

OPEN = GateConfig(min_speedup=0, champion_min_speedup=0, min_accuracy_retention=0, champion_min_accuracy_retention=0)


def registered(workspace: Workspace, *perplexities: float, name: str = "tiny-slim"):
    """A client of a registry with a version for each perplexity; that of the dense model is 10."""
    client = open_client(workspace)
    client.create_registered_model(name)
    for perplexity in perplexities:
        run = client.create_run("0").info.run_id
        both = {"dense/w/perplexity": 10.0, "pruned/w/perplexity": perplexity}
        client.log_batch(run, [Metric(key, value, 0, 0) for key, value in both.items()])
        client.create_model_version(name, f"runs:/{run}/model", run, tags={"base_model": "tiny"})
    return client


def aliases(client, name="tiny-slim"):
    return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}


def test_promote_refuse_promote_and_back(workspace):
    client = registered(workspace, 15.0, 40.0, 16.0)
    first = promote("tiny-slim", 1, "champion", OPEN, workspace, by="ann")
    assert (first.previous, aliases(client)) == ("", {"champion": 1})
    with pytest.raises(PromotionRefusedError) as refused:
        promote("tiny-slim", 2, "champion", OPEN, workspace, by="ben")
    assert str(refused.value) == (
        "tiny-slim version 2 does not become champion: max_perplexity_ratio: 4.0000, 1.5000 above the limit 2.5; "
        "champion_max_perplexity_ratio: 2.6667, 1.5667 above the limit 1.1"
    )
    assert aliases(client) == {"champion": 1}
    assert promote("tiny-slim", 3, "champion", OPEN, workspace, by="cy").previous == "1"
    assert aliases(client) == {"champion": 3, "previous": 1}
    again = promote("tiny-slim", 3, "champion", OPEN, workspace)  # nothing moves
    assert again.summary == "champion of tiny-slim is version 3 already"
    assert aliases(client) == {"champion": 3, "previous": 1}
    back = rollback("tiny-slim", workspace, by="dee")
    assert (back.version, back.previous, aliases(client)) == ("1", "3", {"champion": 1})
    with pytest.raises(FileNotFoundError, match="no version to go back to"):
        rollback("tiny-slim", workspace)
    recorded = {
        version: [
            (e["action"], e["outcome"], e["who"], e["from"], e["to"]) for e in trail(client, "tiny-slim", version)
        ]
        for version in "123"
    }
    assert recorded == {
        "1": [
            ("promote", "moved", "ann", "", "1"),
            ("promote", "moved", "cy", "1", "3"),
            ("rollback", "moved", "dee", "3", "1"),
        ],
        "2": [("promote", "refused", "ben", "1", "2")],
        "3": [("promote", "moved", "cy", "1", "3"), ("rollback", "moved", "dee", "3", "1")],
    }
    [event] = trail(client, "tiny-slim", "2")
    assert event["gates"][0] == {"gate": "max_perplexity_ratio", "limit": 2.5, "value": 4.0, "passed": False}
    assert event["when"].endswith("Z") and event["why"] in str(refused.value)


def test_on_a_server_with_another_alias_and_the_users_own_name(served_workspace):
    client = registered(served_workspace, 15.0, 15.0, name="served-slim")
    for version in (1, 2):
        promote("served-slim", version, "staging", OPEN, served_workspace)
    assert aliases(client, "served-slim") == {"staging": 2, "previous-staging": 1}
    rollback("served-slim", served_workspace, alias="staging")
    assert aliases(client, "served-slim") == {"staging": 1}
    assert {event["who"] for event in trail(client, "served-slim", "1")} == {getpass.getuser()}


def test_a_move_that_dies_in_the_middle_is_finished_by_running_it_again(workspace, monkeypatch):
    client = registered(workspace, 15.0, 15.0)
    promote("tiny-slim", 1, "champion", OPEN, workspace)
    set_alias = type(client).set_registered_model_alias

    def dies(self, name, alias, version):
        if alias == "champion":
            raise KeyboardInterrupt
        set_alias(self, name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(type(client), "set_registered_model_alias", dies)
        with pytest.raises(KeyboardInterrupt):
            promote("tiny-slim", 2, "champion", OPEN, workspace)
    assert aliases(client)["champion"] == 1
    assert trail(client, "tiny-slim", "2")[-1]["outcome"] == "started"
    with pytest.raises(FileNotFoundError, match="no version to go back to"):
        rollback("tiny-slim", workspace)  # never to where it already is
    promote("tiny-slim", 2, "champion", OPEN, workspace)
    assert aliases(client) == {"champion": 2, "previous": 1}


def test_an_alias_that_moves_meanwhile_is_left_alone(workspace, monkeypatch):
    client = registered(workspace, 15.0, 15.0, 15.0)
    promote("tiny-slim", 1, "champion", OPEN, workspace)
    set_tag, calls = type(client).set_model_version_tag, []

    def another_is_quicker(self, name, version, key, value):
        if not calls:
            calls.append(key)
            client.set_registered_model_alias(name, "champion", "3")
        set_tag(self, name, version, key, value)

    monkeypatch.setattr(type(client), "set_model_version_tag", another_is_quicker)
    with pytest.raises(ConnectionError, match="moved by someone else"):
        promote("tiny-slim", 2, "champion", OPEN, workspace)
    assert aliases(client) == {"champion": 3}


@pytest.mark.parametrize("alias", ["latest", "v2", "previous", "a b", "", "1"])
def test_aliases_that_cannot_be_moved_are_refused(alias, workspace):
    with pytest.raises(ValueError, match="alias is"):
        promote("tiny-slim", 1, alias, OPEN, workspace)


def test_a_version_that_is_not_there_is_named_with_those_that_are(workspace):
    with pytest.raises(FileNotFoundError, match="there is no model tiny-slim"):
        promote("tiny-slim", 1, "champion", OPEN, workspace)
    registered(workspace, 15.0, 15.0)
    for number in (7, 10**20):  # databases keep no such number
        with pytest.raises(FileNotFoundError, match=f"tiny-slim version {number} does not exist; tiny-slim has 1, 2"):
            promote("tiny-slim", number, "champion", OPEN, workspace)


def test_the_command_line_takes_gates_from_flags_and_file(workspace, capsys, tmp_path):
    client = registered(workspace, 15.0, 16.0)
    gates = dict.fromkeys(("min_speedup", "champion_min_speedup"), 0)
    gates |= dict.fromkeys(("min_accuracy_retention", "champion_min_accuracy_retention"), 0)
    (tmp_path / "gates.yaml").write_text(json.dumps({"gates": {**gates, "max_perplexity_ratio": 1.4}}))
    command = ["promote", "tiny-slim", "--config", str(tmp_path / "gates.yaml"), "--runs", str(tmp_path)]
    with pytest.raises(ValueError, match="0.1000 above the limit 1.4"):
        app([*command, "--version", "1"], exit_on_error=False, result_action="return_value")
    for version in "12":
        flags = ["--version", version, "--max-perplexity-ratio", "2"]
        app([*command, *flags], exit_on_error=False, result_action="return_value")
    assert "champion of tiny-slim is version 2, was version 1" in capsys.readouterr().out
    app(["rollback", "tiny-slim", "--runs", str(tmp_path)], exit_on_error=False, result_action="return_value")
    assert "champion of tiny-slim is version 1, was version 2" in capsys.readouterr().out
    assert aliases(client) == {"champion": 1}


@pytest.mark.slow
def test_the_flow_moves_the_alias_and_shows_the_gates(prefect_server, workspace):
    from prefect.client.orchestration import get_client

    from flows import promote as flows_promote

    client = registered(workspace, 15.0, 15.0)
    flows_promote.promote("tiny-slim", 1, gates=OPEN, runs=str(workspace.root))
    flows_promote.promote("tiny-slim", 2, gates=OPEN, runs=str(workspace.root), by="team")
    assert aliases(client) == {"champion": 2, "previous": 1}
    flows_promote.rollback("tiny-slim", runs=str(workspace.root))
    assert aliases(client) == {"champion": 1}
    assert trail(client, "tiny-slim", "2")[0]["who"] == "team"
    with get_client(sync_client=True) as server:
        tables = [json.loads(item.data) for item in server.read_artifacts() if item.key == "promote-gates"]
    assert {"gate": "max_perplexity_ratio", "measured": 1.5, "limit": 2.5} in tables[-1]
    assert all(key.startswith(AUDIT) for key in client.get_model_version("tiny-slim", "1").tags if key != "base_model")


@pytest.mark.parametrize("removed", ["1", "2"])
def test_a_run_that_was_removed_for_good_has_measured_nothing(workspace, removed, caplog):
    """``mlflow gc`` removes a deleted run with its figures; the version stays."""
    client = registered(workspace, 15.0, 15.0)
    promote("tiny-slim", 1, "champion", OPEN, workspace)
    run_id = client.get_model_version("tiny-slim", removed).run_id
    client.delete_run(run_id)
    client._tracking_client.store._hard_delete_run(run_id)
    with pytest.raises(PromotionRefusedError, match="no perplexity was measured; measure it, or set .* to 0"):
        promote("tiny-slim", 2, "champion", OPEN, workspace)
    assert f"the run behind tiny-slim version {removed} was removed" in caplog.text
    without = dict.fromkeys(("max_perplexity_ratio", "champion_max_perplexity_ratio"), 0)
    assert promote("tiny-slim", 2, "champion", replace(OPEN, **without), workspace).version == "2"


def test_a_user_who_may_not_write_is_told_so(workspace, monkeypatch):
    """As MLflow's server with basic-auth answers a reader."""
    client = registered(workspace, 15.0, 15.0)
    for version in (1, 2):
        promote("tiny-slim", version, "champion", OPEN, workspace)

    def refuse(*_):
        raise MlflowException("API request to endpoint /x failed with error code 403 != 200. Response body: 'No'")

    monkeypatch.setattr(type(client), "set_model_version_tag", refuse)
    for move in (
        lambda: promote("tiny-slim", 1, "champion", OPEN, workspace),
        lambda: rollback("tiny-slim", workspace),
    ):
        with pytest.raises(PermissionError, match=r"MLflow refused while .*403.*ask for the right, or set MLFLOW_TRA"):
            move()
    assert aliases(client) == {"champion": 2, "previous": 1}


@pytest.mark.parametrize(
    ("of_champion", "of_candidate", "refused"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "(float32, here bfloat16)"),
        ({"device": "cpu (x86_64)"}, {"dtype": "bfloat16"}, "(float32, here bfloat16)"),  # from before it was recorded
        ({"device": "cpu (x86_64)"}, {"dtype": "float32"}, ""),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}, ""),
    ],
)
def test_figures_in_two_dtypes_are_not_compared(workspace, of_champion, of_candidate, refused):
    client = registered(workspace, 15.0, 15.0)
    for version, tags in (("1", of_champion), ("2", of_candidate)):
        for key, value in tags.items():
            client.set_model_version_tag("tiny-slim", version, key, value)
    promote("tiny-slim", 1, "champion", OPEN, workspace)
    if not refused:
        assert promote("tiny-slim", 2, "champion", OPEN, workspace).previous == "1"
        return
    with pytest.raises(PromotionRefusedError) as error:
        promote("tiny-slim", 2, "champion", OPEN, workspace)
    assert f"it was measured with another evaluation.dtype {refused}" in str(error.value)
