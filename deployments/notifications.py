"""`ddsr notify`: messages to Slack, to a webhook or by e-mail when a run fails or crashes, or a new set is promoted."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

from prefect.automations import Automation
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SendgridEmail, SlackWebhook
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture

from ddsr_core.errors import ConfigError
from deployments.deploy import RUNS, TAGGED, update_automation
from tasks.server import reachable

#: Event that `flows.nightly` emits when a new set becomes the active one.
PROMOTED = "ddsr.night.promoted"
BODY = "{{ event.event }}: {{ event.resource['prefect.resource.name'] }}"


def block_for(target: str, sender: str | None = None, api_key: str | None = None) -> NotificationBlock:
    """The Prefect block that reaches a target.

    Args:
        target: URL of a Slack webhook or of any other webhook, which receives ``{"text": message}``; or an e-mail address.
        sender: address that e-mail comes from.
        api_key: of SendGrid, for e-mail.

    Raises:
        ConfigError: neither a URL nor an address, or e-mail without sender or key.
    """
    if target.startswith("https://hooks.slack.com/"):
        return SlackWebhook(url=target)
    if target.startswith(("http://", "https://")):
        return CustomWebhookNotificationBlock(name="ddsr", url=target, json_data={"text": "{{subject}}\n{{body}}"})
    if "@" not in target:
        raise ConfigError(
            f"{target!r} is neither a URL nor an e-mail address",
            where="target",
            fix="give the URL of a webhook, or an e-mail address",
        )
    if not sender or not api_key:
        raise ConfigError(
            "e-mail is sent by SendGrid",
            where="--sender",
            fix="give --sender ADDRESS and set SENDGRID_API_KEY, or use a webhook",
        )
    return SendgridEmail(sender_email=sender, to_emails=[target], api_key=api_key)


def notify(
    target: str, name: str = "ddsr", sender: str | None = None, api_key: str | None = None
) -> Iterator[tuple[str, str]]:
    """Set up messages on the Prefect server; yields each item and ``created``, ``updated`` or ``unchanged``.

    Args:
        name: of this target; the same name again replaces it.

    Raises:
        ConfigError: as `block_for`, or PREFECT_API_URL is not set.
        DdsrError: the server does not answer.
    """
    block = block_for(target, sender, api_key)
    with reachable() as client:
        document = block.save(f"{name}-notifications".lower(), overwrite=True)
        yield f"notification block {name}-notifications", "saved"
        for automation in automations(UUID(str(document)), name):
            yield f"automation {automation.name}", update_automation(client, automation)


def automations(block: UUID, name: str = "ddsr") -> list[Automation]:
    """A message for each run of ours that fails or crashes, and for each set that a night promotes."""
    return [
        Automation(
            name=f"{name}: notify of failed runs",
            description="Sends a message when a run has failed or crashed.",
            trigger=EventTrigger(
                match=RUNS, match_related=TAGGED, for_each={"prefect.resource.id"}, posture=Posture.Reactive,
                expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}, threshold=1, within=timedelta(0),
            ),
            actions=[SendNotification(block_document_id=block, subject="ddsr: a run has failed", body=BODY)],
        ),
        Automation(
            name=f"{name}: notify of promoted sets",
            description="Sends a message when a night has promoted a new distilled set.",
            trigger=EventTrigger(
                match={"prefect.resource.id": "ddsr.night.*"}, posture=Posture.Reactive, expect={PROMOTED}, threshold=1,
                within=timedelta(0),
            ),
            actions=[SendNotification(block_document_id=block, subject="ddsr: a new set is in use", body=BODY)],
        ),
    ]  # fmt: skip
