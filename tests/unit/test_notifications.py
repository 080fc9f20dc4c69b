"""Messages on failure, crash and promotion: which block a target gets, and what the automations wait for."""

from __future__ import annotations

from uuid import uuid4

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SendgridEmail, SlackWebhook

from ddsr_core.errors import ConfigError
from deployments.notifications import automations, block_for


def test_a_target_gets_the_block_that_reaches_it():
    assert isinstance(block_for("https://hooks.slack.com/services/x"), SlackWebhook)
    hook = block_for("https://example.org/hook")
    assert isinstance(hook, CustomWebhookNotificationBlock)
    assert hook.json_data == {"text": "{{subject}}\n{{body}}"}
    mail = block_for("me@example.org", sender="ddsr@example.org", api_key="secret")
    assert isinstance(mail, SendgridEmail)
    assert mail.to_emails == ["me@example.org"]


@pytest.mark.parametrize(("target", "fix"), [("nobody", "URL of a webhook"), ("me@example.org", "SENDGRID_API_KEY")])
def test_a_target_that_cannot_be_reached_says_what_is_missing(target: str, fix: str):
    with pytest.raises(ConfigError) as caught:
        block_for(target)
    assert fix in str(caught.value.fix)


def test_failures_crashes_and_promotions_are_reported():
    failed, promoted = automations(block := uuid4())
    assert failed.trigger.expect == {"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}  # type: ignore[union-attr]
    assert promoted.trigger.expect == {"ddsr.night.promoted"}  # type: ignore[union-attr]
    assert all(item.actions[0].block_document_id == block for item in (failed, promoted))  # type: ignore[union-attr]
