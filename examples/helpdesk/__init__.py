"""A team's own project, to copy: a help desk whose agent has three of the team's Python functions as tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from components.config.project import Collecting, Rows

# -- What the team has: functions, which a real team's ask its own systems, and a handbook.

ORDERS = {
    "A101": "packed",
    "A102": "on its way",
    "B203": "delivered",
    "B204": "lost",
    "C305": "paid",
    "C306": "ordered",
}
Day = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
DAYS: tuple[Day, ...] = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def order_status(order: str) -> str:
    """Where an order is, by its number."""
    return ORDERS.get(order.upper(), f"no order {order}")


def refund(price: float, days: int = 0) -> str:
    """What a customer gets back for an article that is returned after some days."""
    return f"{price * (1 if days <= 14 else 0.5 if days <= 30 else 0):.2f} euros"


def opening_hours(day: Day) -> str:
    """When the shop is open on a day of the week."""
    return "closed" if day == "sunday" else "10 to 14" if day == "saturday" else "9 to 18"


def tools(_folder: Path) -> list[Callable[..., str]]:
    return [order_status, refund, opening_hours]


# -- What the agent learns from: each question wants one call; {0}, {1} are the arguments.

ANSWERS = {order_status: "Your order is {}.", refund: "You get {} back.", opening_hours: "We are open: {}."}
WORDINGS = {
    order_status: ["Where is order {0}?", "What about my order {0}", "Has {0} been sent yet?"],
    refund: ["What do I get back for {0} euros after {1} days?", "I return it after {1} days, it cost {0} euros."],
    opening_hours: ["When are you open on {0}?", "Can I come on {0}?"],
}
UNSEEN = {
    order_status: ["Please tell me how order {0} is doing."],
    refund: ["It was {0} euros and {1} days ago, how much do you pay back?"],
    opening_hours: ["What are your hours on {0}?"],
}
"""Wordings that training never sees: the held-out suites ask in them."""
ARGUMENTS: dict[Callable[..., str], list[dict[str, Any]]] = {
    order_status: [{"order": order} for order in ORDERS],
    refund: [{"price": price, "days": days} for price in (20, 35) for days in (3, 20)],
    opening_hours: [{"day": day} for day in DAYS],
}
LABELS = {order_status: "orders", refund: "refunds", opening_hours: "hours"}


def cases(wordings: dict[Any, list[str]]) -> Iterator[tuple[Callable[..., str], str, dict[str, Any]]]:
    for function, templates in wordings.items():
        for template in templates:
            for arguments in ARGUMENTS[function]:
                yield function, template.format(*arguments.values()), arguments


def conversation(function: Callable[..., str], question: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A question, the call that answers it, what the tool gives and the answer, in OpenAI's shape."""
    name, result = function.__name__, function(**arguments)
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result, "tool_call_id": "call_1", "name": name},
        {"role": "assistant", "content": ANSWERS[function].format(result)},
    ]
    return {"id": question, "messages": messages}


def ticket(function: Callable[..., str], question: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A question with its label, and the line that a ticket has as its subject."""
    subject = f"{LABELS[function]}: {' '.join(map(str, arguments.values()))}"
    return {"id": question, "text": question, "label": LABELS[function], "source": question, "target": subject}


# -- What the platform asks a project (components/config/project.py).

datasets = {
    "helpdesk-handbook": "documents",
    "helpdesk-conversations": "conversations",
    "helpdesk-tickets": "labelled_texts",
    "helpdesk-subjects": "text_pairs",
}
smoke_questions = {
    "agent": "Where is order A102?",
    "classifier": "Where is order A102?",
    "summarizer": "Where is A101?",
}
scales = {
    "all": {
        "pretrain": {
            "decoder": {"dataset": "helpdesk-handbook"},
            "encoder": {"dataset": "helpdesk-handbook"},
            "encoder_decoder": {"dataset": "helpdesk-handbook"},
        },
        "tune": {"dataset": "helpdesk-conversations"},
        "classifier": {"dataset": "helpdesk-tickets"},
        "summarizer": {"dataset": "helpdesk-subjects"},
    }
}


def rows(name: str, _: Collecting) -> Rows:
    if name == "helpdesk-handbook":
        text = Path(__file__).with_name("handbook.md").read_text(encoding="utf-8")
        texts = [{"id": part[:40], "text": part, "source": "handbook.md"} for part in text.split("\n\n")]
        return Rows(texts[2:], texts[:2])
    make = conversation if name == "helpdesk-conversations" else ticket
    learned = [make(*case) for case in cases(WORDINGS)]
    held_out = [make(*case) | {"suite": f"{case[0].__name__}/new_wordings"} for case in cases(UNSEEN)]
    if make is conversation:
        return Rows(learned, held_out)
    return Rows(learned[::2] + learned[1::4], held_out, learned[3::4])
