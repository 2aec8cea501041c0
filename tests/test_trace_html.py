"""A trace in a notebook: what was recorded, what was not seen, nothing of the user's taken for HTML."""

import re
from html.parser import HTMLParser

import pandas as pd
import torch
from torch import nn

import gradlab as gl
from gradlab.trace import Trace


class Reader(HTMLParser):
    """Tags opened and closed in order, and the text that a reader sees."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], set(), ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert not attrs
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def test_what_was_recorded_is_said():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LSTM(4, 2))
    model.add_module("idle", nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gl.watch(model, optimizer, every=2) as probe:
        for _ in range(5):
            optimizer.zero_grad()
            model[2](model[1](model[0](torch.ones(2, 1, 3))))[0].sum().backward()
            optimizer.step()
    read = Reader(probe.trace._repr_html_())
    assert " of Sequential: 3 recorded steps (0 to 4), 3 layers, 8 parameters" in read.text
    for name, frame in probe.trace.tables.items():
        assert (f"{name}\n{len(frame)}\n" in read.text) == (len(frame) > 0), name
    assert "through time: 2 (timesteps=True follows them)" in read.text
    assert "never ran: idle" in read.text


def test_names_of_the_users_are_escaped():
    evil = "<script>alert('&amp;')</script>"
    layers = pd.DataFrame({"step": [0], "layer": [evil], evil: [1.0]})
    info = {
        "model": evil,
        "not_seen": {evil: evil},
        "never_ran": [evil + "2"],
        "time_not_watched": [evil],
        "notes": [evil],
    }
    read = Reader(Trace({"layers": layers}, info)._repr_html_())
    assert "script" not in read.tags
    assert read.text.count(evil) == 7


def test_an_empty_trace_and_a_merged_one():
    assert "nothing recorded" in Reader(Trace()._repr_html_()).text
    one = Trace({"steps": pd.DataFrame({"step": [3]})}, {"model": "Net"})
    read = Reader(Trace.merge([one, one], [{"seed": 0}, {"seed": 1}])._repr_html_())
    assert "merged from 2 runs, 1 recorded step (3 to 3)" in read.text


def test_a_deep_net_stays_short():
    reasons = {f"layers.{k}": "it runs elsewhere" for k in range(500)}
    page = Trace({}, {"not_seen": reasons, "never_ran": [f"idle.{k}" for k in range(500)]})._repr_html_()
    assert len(page) < 2000
    assert re.search(r"and 492 more.*never ran: idle\.0.* and 492 more", page, re.DOTALL)
