"""Real ONNX models behind a real server, driven by Triton's own client and by curl's kind of requests."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from benchmarks.servers import Server, free_port, running, slimserve
from tests.integration.fake_server import wait_until, workers_of
from tests.plain_models import DOUBLE, LOOKUP, MAGIKA, MINILM_INT8, PPOCR, real_model, write_graph

ort = pytest.importorskip("onnxruntime")
triton = pytest.importorskip("tritonclient.http")

PATIENCE = 60.0
MODELS = {"magika": MAGIKA, "minilm": MINILM_INT8, "ocr": PPOCR}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    found = {name: real_model(*model) for name, model in MODELS.items()}
    return found | {name: write_graph(folder, graph, f"{name}.onnx") for name, graph in GRAPHS.items()}


GRAPHS = {"double": DOUBLE, "lookup": LOOKUP}


@pytest.fixture(scope="module")
def server(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plain")
    entries = "".join(f"  - name: {name}\n    source: {path}\n" for name, path in files.items())
    config = folder / "config.yaml"
    config.write_text(f"device: cpu\nthreads: 1\nmodels:\n{entries}")
    port = free_port()
    command = slimserve("serve", "--config", str(config), "--port", str(port))
    with running("slimserve", command, port, "/health/ready", log=folder / "log") as found:
        yield found


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=PATIENCE) as found:
        yield found


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ask(client: Any, model: str, inputs: dict[str, Any], output: str, *, binary: bool = True) -> Any:
    types = {"int32": "INT32", "int64": "INT64", "float32": "FP32"}
    given = []
    for name, array in inputs.items():
        one = triton.InferInput(name, array.shape, types[array.dtype.name])
        one.set_data_from_numpy(array, binary_data=binary)
        given.append(one)
    wanted = [triton.InferRequestedOutput(output, binary_data=binary)]
    return client.infer(model, given, outputs=wanted).as_numpy(output)


def test_triton_s_client_finds_out_what_there_is(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.is_model_ready("magika")
    assert client.is_model_ready("magika", "1")
    assert client.get_model_metadata("magika") == {
        "name": "magika",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "bytes", "datatype": "INT32", "shape": [-1, 2048]}],
        "outputs": [{"name": "target_label", "datatype": "FP32", "shape": [-1, 214]}],
    }


@pytest.mark.parametrize("binary", [True, False])
def test_magika_gives_what_the_runtime_gives(client: Any, files: dict[str, Path], binary: bool) -> None:
    x = np.random.default_rng(1).integers(0, 257, (3, 2048), dtype=np.int32)
    (expected,) = session(files["magika"]).run(None, {"bytes": x})
    np.testing.assert_allclose(ask(client, "magika", {"bytes": x}, "target_label", binary=binary), expected, atol=1e-6)


def test_sentences_of_different_lengths_at_once_give_what_each_gives_alone(
    server: Server, files: dict[str, Path]
) -> None:
    """Scales of the int8 products are those of a whole batch, so neighbours change the last digits."""
    numbers = np.random.default_rng(2)
    direct = session(files["minilm"])
    sentences = []
    for length in (5, 12, 7, 30, 9, 16, 11, 8):
        ids = numbers.integers(1000, 20000, (1, length))
        sentences.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})

    def one(sentence: dict[str, Any]) -> Any:
        with triton.InferenceServerClient(f"127.0.0.1:{server.port}", network_timeout=PATIENCE) as client:
            return ask(client, "minilm", sentence, "last_hidden_state")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, sentences))
    for sentence, answer in zip(sentences, answers, strict=True):
        (expected,) = direct.run(["last_hidden_state"], sentence)
        assert answer.shape == expected.shape
        mean, wanted = answer.mean(axis=1)[0], expected.mean(axis=1)[0]
        assert mean @ wanted / np.linalg.norm(mean) / np.linalg.norm(wanted) > 0.98


def test_lines_of_text_of_different_widths(client: Any, files: dict[str, Path]) -> None:
    direct = session(files["ocr"])
    for width in (64, 160, 320):
        x = np.random.default_rng(width).standard_normal((1, 3, 48, width)).astype(np.float32)
        (expected,) = direct.run(None, {"x": x})
        got = ask(client, "ocr", {"x": x}, "softmax_11.tmp_0")
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("double/infer", {"inputs": []}, 400, "input 'x': it is missing"),
        ("double/infer", "not json", 400, "no infer request"),
        ("double/versions/2/infer", {"inputs": []}, 404, "no version '2'"),
        ("nobody/infer", {"inputs": []}, 404, "not served here"),
        (
            "double/infer",
            {"inputs": [{"name": "x", "shape": [65, 3], "datatype": "FP32", "data": [0] * 195}]},
            400,
            "65",
        ),
    ],
)
def test_errors_are_flat_and_say_what_is_wrong(server: Server, path: str, body: Any, status: int, words: str) -> None:
    content = {"content": body} if isinstance(body, str) else {"json": body}
    answer = httpx.post(f"{server.url}/v2/models/{path}", timeout=PATIENCE, **content)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_one_bad_input_fails_alone(server: Server) -> None:
    def one(row: int) -> httpx.Response:
        body = {"inputs": [{"name": "ids", "shape": [1, 1], "datatype": "INT64", "data": [row]}]}
        return httpx.post(f"{server.url}/v2/models/lookup/infer", json=body, timeout=PATIENCE)

    rows = [0, 1, 99, 2, 3, -50] * 4
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, rows))
    for row, answer in zip(rows, answers, strict=True):
        if 0 <= row < 4:
            assert answer.json()["outputs"][0]["data"] == [2 * row, 2 * row + 1]
        else:
            assert answer.status_code == 400
            assert str(row) in answer.json()["error"]


def test_a_language_route_says_where_to_go(server: Server) -> None:
    body = {"model": "double", "prompt": "hello"}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 400
    assert "/v2/models/double/infer" in answer.json()["error"]["message"]


def test_metrics_count_rows(server: Server, client: Any) -> None:
    def rows() -> float:
        text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text
        lines = (line for line in text.splitlines() if line.startswith('slimserve_infer_rows_total{model="double"}'))
        return float(next(lines).split()[1])

    before = rows()
    ask(client, "double", {"x": np.zeros((5, 3), np.float32)}, "y")
    assert rows() == before + 5


def test_a_worker_holds_no_torch(server: Server) -> None:
    """Of plain models alone; it would cost seconds at the start and hundreds of megabytes."""
    (worker,) = workers_of(server.process)
    maps = {Path(each.path).name for each in psutil.Process(worker.pid).memory_maps()}
    assert any("onnxruntime" in name for name in maps)
    assert not any(name.startswith("libtorch") for name in maps)


def test_a_killed_worker_costs_no_request(server: Server) -> None:
    """They are computed again by the one that takes its place."""
    (worker,) = workers_of(server.process)
    answers: list[httpx.Response] = []
    lock = threading.Lock()

    def many() -> None:
        body = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
        with httpx.Client(timeout=PATIENCE) as http:
            for _ in range(30):
                answer = http.post(f"{server.url}/v2/models/double/infer", json=body)
                with lock:
                    answers.append(answer)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answers) > 20, "the first answers")
    worker.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join(PATIENCE)
    assert len(answers) == 120
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.json()["outputs"][0]["data"] == [2, 4, 6] for answer in answers)
    (after,) = workers_of(server.process)
    assert after.pid != worker.pid


def test_a_file_that_reaches_outside_its_folder_is_never_served(tmp_path: Path) -> None:
    from tests.unit.onnx.test_checks import with_external_weights

    port = free_port()
    command = slimserve("serve", str(with_external_weights(tmp_path, "../../etc/passwd")), "--port", str(port))
    with pytest.raises(RuntimeError, match="outside its folder"):  # noqa: SIM117
        with running("slimserve", command, port, "/health/ready", log=tmp_path / "log", timeout=60):
            pass
