"""The routes for people: uploads in, JSON or pictures out."""

import json

import cv2
import numpy as np
import pytest

from data.decode import decode_image
from data.preprocess import center_view, whole_view
from tests.server.conftest import PREPROCESS
from tests.server.images import jpeg, png


def upload(*files):
    return [("file", (f"photo{n}.png", file, "image/png")) for n, file in enumerate(files)]


def shape_of(picture):
    return cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape


def test_embeddings_come_by_file_in_the_order_of_sending(http, runtime):
    files = [png(0), jpeg(1), png(2)]
    answer = http.post("/v1/embeddings", files=upload(*files)).json()
    pixels = np.stack([center_view(decode_image(file), PREPROCESS) for file in files])
    assert [item["name"] for item in answer["items"]] == ["photo0.png", "photo1.png", "photo2.png"]
    assert answer["dimension"] == 48
    got = np.array([item["embedding"] for item in answer["items"]])
    np.testing.assert_allclose(got, runtime.run(pixels)["embedding"], atol=1e-5)


def test_an_image_may_be_the_body_itself(http):
    by_form = http.post("/v1/embeddings?normalize=true", files=upload(png(0))).json()
    by_body = http.post("/v1/embeddings?normalize=true", content=png(0), headers={"content-type": "image/png"}).json()
    assert by_body["items"][0]["embedding"] == by_form["items"][0]["embedding"]
    assert np.linalg.norm(by_body["items"][0]["embedding"]) == pytest.approx(1)


def test_attention_as_numbers(http, runtime):
    answer = http.post("/v1/attention?mass=0.5&size=64", files=upload(png(0))).json()
    wanted = runtime.run(whole_view(decode_image(png(0)), PREPROCESS, 64)[None], ("attention",))["attention"][0]
    assert (answer["heads"], answer["grid"]) == (3, [8, 8])
    np.testing.assert_allclose(answer["items"][0]["attention"], wanted, atol=1e-5)
    assert np.array(answer["items"][0]["mask"]).shape == (3, 8, 8)


def test_one_head_of_attention(http):
    everything = http.post("/v1/attention", files=upload(png(0))).json()["items"][0]
    one = http.post("/v1/attention?head=2", files=upload(png(0))).json()["items"][0]
    assert one["attention"] == everything["attention"][2:]


@pytest.mark.parametrize("query", ["", "head=1", "mass=0.5", "head=0&mass=0.9"])
def test_attention_as_a_picture_has_the_size_of_the_image(http, query):
    answer = http.post(f"/v1/attention?format=png&{query}", files=upload(png(0, 60, 90)))
    assert answer.headers["content-type"] == "image/png"
    assert shape_of(answer.content) == (60, 90, 3)


def test_heads_look_different(http):
    pictures = {http.post(f"/v1/attention?format=png&head={n}", files=upload(png(0))).content for n in range(3)}
    assert len(pictures) == 3


def test_the_accept_header_asks_for_a_picture_too(http):
    answer = http.post("/v1/depth", files=upload(png(0, 60, 90)), headers={"accept": "image/png"})
    assert shape_of(answer.content) == (60, 90, 3)


def test_depth_as_numbers_with_their_unit(http, runtime):
    answer = http.post("/v1/depth", files=upload(png(0))).json()
    wanted = runtime.run(whole_view(decode_image(png(0)), PREPROCESS)[None], ("depth",))["depth"][0]
    assert (answer["unit"], answer["size"]) == ("furlong", [48, 48])
    np.testing.assert_allclose(answer["items"][0]["depth"], wanted, atol=1e-5)


def test_a_model_without_its_head_is_absent_and_says_why(http):
    answer = http.post("/v1/segmentation", files=upload(png(0)))
    assert answer.status_code == 404
    assert "no segmentation head is loaded" in answer.json()["error"]


@pytest.fixture
def birds(http):
    """A collection of six pictures, two of a label, one after another."""
    http.delete("/v1/collections/birds")
    for n in range(6):
        fields = {"id": f"bird{n}", "label": f"kind{n // 2}", "metadata": json.dumps({"n": n})}
        answer = http.post("/v1/collections/birds/items", files=upload(png(n)), data=fields)
        assert answer.status_code == 201, answer.text
        assert answer.json() == {"ids": [f"bird{n}"]}
    return "/v1/collections/birds"


def test_items_are_listed_page_by_page_with_pictures(http, birds):
    first = http.get(f"{birds}/items?limit=4").json()
    rest = http.get(f"{birds}/items?limit=4&after={first['next']}").json()
    assert [item["id"] for item in first["items"] + rest["items"]] == [f"bird{n}" for n in range(6)]
    assert rest["next"] is None
    assert first["items"][3] | {"thumbnail": ""} == {
        "id": "bird3",
        "label": "kind1",
        "metadata": {"n": 3},
        "thumbnail": "",
    }
    picture = http.get(first["items"][3]["thumbnail"])
    assert picture.headers["content-type"] == "image/jpeg"
    assert shape_of(picture.content) == (80, 100, 3)
    assert [item["id"] for item in http.get(f"{birds}/items?label=kind2").json()["items"]] == ["bird4", "bird5"]


def test_an_image_finds_itself_first(http, birds):
    results = http.post(f"{birds}/search?k=3", files=upload(png(4), png(1))).json()["results"]
    assert [row["neighbours"][0]["id"] for row in results] == ["bird4", "bird1"]
    assert results[0]["neighbours"][0]["score"] == pytest.approx(1)
    assert results[0]["neighbours"][0]["metadata"] == {"n": 4}
    assert all(len(row["neighbours"]) == 3 for row in results)


def test_classify_votes_by_closeness(http, birds):
    """Each of the k nearest votes for its label with exp(cosine / 0.07)."""
    neighbours = http.post(f"{birds}/search?k=6", files=upload(png(2))).json()["results"][0]["neighbours"]
    votes: dict[str, float] = {}
    for one in neighbours:
        votes[one["label"]] = votes.get(one["label"], 0) + np.exp(one["score"] / 0.07)
    answer = http.post(f"{birds}/classify?k=6", files=upload(png(2))).json()["results"][0]["classes"]
    assert [one["label"] for one in answer] == sorted(votes, key=lambda label: -votes[label])
    for one in answer:
        assert one["share"] == pytest.approx(votes[one["label"]] / sum(votes.values()), rel=1e-4)


def test_what_is_deleted_is_not_found_again(http, birds):
    assert http.delete(f"{birds}/items/bird4").status_code == 204
    assert http.delete(f"{birds}/items/bird4").status_code == 404
    found = http.post(f"{birds}/search?k=5", files=upload(png(4))).json()["results"][0]["neighbours"]
    assert "bird4" not in {one["id"] for one in found}
    assert http.delete(birds).status_code == 204
    assert http.get(f"{birds}/items").status_code == 404
    assert "birds" not in {one["name"] for one in http.get("/v1/collections").json()["collections"]}


def test_health_is_answered_without_a_body_too(http):
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert http.head(path).status_code == 200


def test_an_id_is_taken_once(http, birds):
    answer = http.post(f"{birds}/items", files=upload(png(9)), data={"id": "bird0"})
    assert answer.status_code == 409
    assert "taken" in answer.json()["error"]
    assert len(http.get(f"{birds}/items").json()["items"]) == 6


def test_ids_with_unusual_characters_have_links_that_work(http, birds):
    name = "50% of #1? ä&b"
    assert http.post(f"{birds}/items", files=upload(png(9)), data={"id": name}).json() == {"ids": [name]}
    item = http.get(f"{birds}/items?after=0&limit=1000").json()["items"][-1]
    assert item["id"] == name
    assert http.get(item["thumbnail"]).status_code == 200


def test_one_bad_image_adds_none(http, birds):
    answer = http.post(f"{birds}/items", files=upload(png(10), b"no image", png(11)))
    assert answer.status_code == 400
    assert "image[1]" in answer.json()["error"]
    assert len(http.get(f"{birds}/items").json()["items"]) == 6


def test_the_samples_cannot_be_changed(http):
    for answer in (http.delete("/v1/collections/samples"), http.delete("/v1/collections/samples/items/red:0")):
        assert answer.status_code == 409
    listed = {one["name"]: one for one in http.get("/v1/collections").json()["collections"]}
    assert listed["samples"] | {"created": ""} == {
        "name": "samples",
        "size": 24,
        "dimension": 48,
        "created": "",
        "usable": True,
        "read_only": True,
    }


def test_only_data_that_the_operator_named_is_evaluated(http, colours):
    for data in ("nothing", str(colours), "../colours"):
        answer = http.post("/v1/evaluations", json={"evaluator": "knn", "data": data})
        assert answer.status_code == 404
        assert "there is: colours" in answer.json()["error"]
    assert http.post("/v1/evaluations", json={"evaluator": "guess", "data": "colours"}).status_code == 400


def test_every_route_is_described(http):
    api = http.get("/openapi.json").json()
    assert api["info"]["title"] == "Dinoscope"
    wanted = {
        "/v1/embeddings",
        "/v1/attention",
        "/v1/depth",
        "/v1/segmentation",
        "/v1/collections/{name}/items",
        "/v1/collections/{name}/search",
        "/v1/collections/{name}/classify",
        "/v1/evaluations",
        "/v1/evaluations/{run_id}",
        "/v1/evaluations/{run_id}/report",
        "/v2/models/{model}/infer",
        "/v2/models/{model}/versions/{version}/infer",
    }
    assert wanted <= set(api["paths"])
    operations = [operation for methods in api["paths"].values() for operation in methods.values()]
    assert all(operation["summary"] for operation in operations)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for reference in set(json.dumps(api).split('"$ref": "#/')[1:]):
        node = api
        for key in reference.split('"')[0].split("/"):
            node = node[key]


def test_the_page_for_people_needs_nothing_from_elsewhere(http):
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text
    assert "://" not in page.text
    assert " src=" not in page.text
    assert http.get("/", follow_redirects=False).headers["location"] == "/docs"


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_a_collection_is_exported_and_imported_as_one_file(http, form):
    name = f"moved-{form}"
    http.post(
        f"/v1/collections/{name}/items", files=upload(png(0), png(1)), data={"label": ["a", "b"]}
    ).raise_for_status()
    exported = http.get(f"/v1/collections/{name}/export?format={form}")
    assert exported.headers["content-disposition"] == f'attachment; filename="{name}.{form}"'
    taken = http.post(f"/v1/collections/{name}-copy/import", content=exported.content)
    assert taken.status_code == 201
    items = http.get(f"/v1/collections/{name}/items").json()["items"]
    copies = http.get(f"/v1/collections/{name}-copy/items").json()["items"]
    assert [(one["id"], one["label"], one["metadata"]) for one in copies] == [
        (one["id"], one["label"], one["metadata"]) for one in items
    ]
    assert http.get(copies[0]["thumbnail"]).content == http.get(items[0]["thumbnail"]).content
    assert http.get(f"/v1/collections/{name}/export?format=csv").status_code == 400
    assert http.post(f"/v1/collections/{name}-copy/import", content=b"nonsense").status_code == 400


def test_what_is_kept_comes_back_as_it_was_sent_however_long_its_numbers(http):
    kept = {"id": 2**70, "list": [-(2**63) - 1, 2**64, 1e300, 0.5]}
    vectors = [{"id": name, "embedding": [1.0] * 48, "metadata": kept, "label": ""} for name in ("one", "two")]
    http.post("/v1/collections/long/items", json={"items": vectors}).raise_for_status()
    http.post(
        "/v1/collections/long/items", files=upload(png(0)), data={"metadata": json.dumps(kept)}
    ).raise_for_status()
    for form in ("npz", "parquet"):
        exported = http.get(f"/v1/collections/long/export?format={form}")
        http.post(f"/v1/collections/long-{form}/import", content=exported.content).raise_for_status()
        items = http.get(f"/v1/collections/long-{form}/items").json()["items"]
        assert [one["metadata"] for one in items] == [kept] * 3
        assert items == [
            {**one, "thumbnail": one["thumbnail"] and one["thumbnail"].replace("/long/", f"/long-{form}/")}
            for one in http.get("/v1/collections/long/items").json()["items"]
        ]


def test_search_and_classify_among_one_label_only(http):
    http.post(
        "/v1/collections/two/items", files=upload(png(0), png(1), png(2)), data={"label": ["a", "b", "b"]}
    ).raise_for_status()
    found = http.post("/v1/collections/two/search?label=b", files=upload(png(0))).json()["results"][0]["neighbours"]
    assert {one["label"] for one in found} == {"b"}
    assert len(found) == 2
    assert http.post("/v1/collections/two/search?label=c", files=upload(png(0))).status_code == 400


def test_a_label_of_any_length_can_be_searched_and_listed_and_an_empty_one_is_none(http):
    long = "long " * 500
    http.post(
        "/v1/collections/labels/items", files=upload(png(0), png(1)), data={"label": ["short", long]}
    ).raise_for_status()
    listed = {
        label: len(http.get("/v1/collections/labels/items", params={"label": label}).json()["items"])
        for label in ("short", long, "")
    }
    assert listed == {"short": 1, long: 1, "": 2}
    for label, k in ((long, 1), ("", 2)):
        answer = http.post("/v1/collections/labels/search", params={"label": label, "k": k}, files=upload(png(0)))
        assert len(answer.json()["results"][0]["neighbours"]) == k


@pytest.mark.parametrize("where", ["http://other", "https://other", "HTTP://other:99"])
def test_the_target_of_a_request_may_be_a_whole_url(http, where):
    """As some proxies send it (RFC 9112, section 3.2.2): its path and query count, and its host in the place of the header."""

    def get(target):
        return http.get("/", extensions={"target": target.encode()})

    assert get(f"{where}/v2/health/live").json() == {"live": True}
    assert len(get(f"{where}/v1/collections/samples/items?limit=2").json()["items"]) == 2
    assert [get(where + rest).headers["location"] for rest in ("", "/", "?x=1")] == ["/docs"] * 3
    assert get(f"{where}/docs/").headers["location"].lower() == f"http{where[where.index(':') :]}/docs"
