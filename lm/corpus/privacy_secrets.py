"""Secrets in text and code: keys, tokens and passwords.

Each form is guarded by a literal that stands in it, so that text without any is searched at the
speed of `in`. Forms are those that the issuers document; assignments to a name such as `api_key`
count by the entropy of the value, as in Yelp's detect-secrets (base64 4.5 and hexadecimal 3.0 bits
there; here 3.0 for both, since the name must speak of a secret as well, and there must be a letter
and a figure, or half of all code would count).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
import functools
import math
import re

Span = tuple[int, int]

# kind: (a literal that each has, expression). With a group, the group is the secret.
FORMS = {
    'private_key': (
        ('PRIVATE KEY',),
        r'-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:[^-]|-(?!----END)){0,20000}'
        r'(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----)?',
    ),
    'putty_key': (
        ('PuTTY-User-Key-File',),
        r'PuTTY-User-Key-File-[23]: [\s\S]{0,4000}?Private-MAC: [0-9a-f]+',
    ),
    'age_key': (('AGE-SECRET-KEY-1',), r'AGE-SECRET-KEY-1[A-Z0-9]{58}'),
    'jwt': (('eyJ',), r'\beyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]{8,})?'),
    'password_in_url': (('://',), r'''://[^\s:/@"'<>]{0,64}:([^\s/@"'<>]{3,128})@[\w.-]'''),
    'aws_access_key': (
        ('AKIA', 'ASIA', 'ABIA', 'ACCA', 'A3T'),
        r'\b(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{16}\b',
    ),
    'google_api_key': (('AIza',), r'\bAIza[\w-]{35}(?![\w-])'),
    'google_oauth': (('ya29.',), r'\bya29\.[\w-]{20,}'),
    'google_client_secret': (('GOCSPX-',), r'\bGOCSPX-[\w-]{28}'),
    'azure_storage_key': (('AccountKey=',), r'AccountKey=([A-Za-z0-9+/]{86}==)'),
    'azure_client_secret': (('Q~',), r'\b[\w~.-]{3}\dQ~[\w~.-]{31,34}'),
    'azure_sas': (('sig=',), r'[?&]sig=([A-Za-z0-9%+/]{43,}(?:%3[Dd]|=))'),
    'github_token': (
        ('ghp_', 'gho_', 'ghu_', 'ghs_', 'ghr_'),
        r'\bgh[pousr]_[A-Za-z0-9]{36,255}\b',
    ),
    'github_fine_grained': (('github_pat_',), r'\bgithub_pat_\w{22,255}'),
    'gitlab_token': (
        (
            'glpat-', 'gloas-', 'gloat-', 'glrt-', 'gldt-', 'glcbt-', 'glptt-', 'glft-', 'glimt-',
            'glsoat-', 'glagent-', 'GR1348941',
        ),  # fmt: skip
        r'\b(?:gl(?:pat|oas|oat|rt|dt|cbt|ptt|ft|imt|soat|agent)-|GR1348941)[\w-]{20,}',
    ),
    'bitbucket_token': (('ATBB',), r'\bATBB[A-Za-z0-9]{24}[A-F0-9]{8}\b'),
    'atlassian_token': (('ATATT3',), r'\bATATT3[\w=-]{60,}'),
    'slack_token': (
        ('xoxa-', 'xoxb-', 'xoxe-', 'xoxo-', 'xoxp-', 'xoxr-', 'xoxs-'),
        r'\bxox[abeoprs]-[A-Za-z0-9-]{10,}',
    ),
    'slack_app_token': (('xapp-',), r'\bxapp-\d-[A-Z0-9]+-\d+-[a-z0-9]+'),
    'slack_webhook': (
        ('hooks.slack.com',),
        r'hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9+/]{40,}',
    ),
    'discord_webhook': (
        ('/api/webhooks/',),
        r'discord(?:app)?\.com/api/webhooks/\d{17,20}/[\w-]{60,}',
    ),
    'discord_token': (('.',), r'\.(?<=[A-Za-z\d]{24}\.)[\w-]{6}\.[\w-]{27,38}(?![\w-])'),
    'telegram_token': ((':AA',), r'\b\d{8,10}:AA[\w-]{33}(?![\w-])'),
    'stripe_key': (
        ('k_live_', 'k_test_', 'k_prod_'),
        r'\b[rs]k_(?:live|test|prod)_[A-Za-z0-9]{10,99}',
    ),
    'stripe_webhook': (('whsec_',), r'\bwhsec_[A-Za-z0-9+/]{24,}'),
    'square_token': (('sq0',), r'\bsq0(?:atp|csp|idp)-[\w-]{22,43}'),
    'twilio_key': (('SK',), r'\bSK[0-9a-f]{32}\b'),
    'sendgrid_key': (('SG.',), r'\bSG\.[\w-]{22}\.[\w-]{43}'),
    'mailgun_key': (('key-',), r'\bkey-[0-9a-f]{32}\b'),
    'mailchimp_key': (
        ('-us1', '-us2', '-us3', '-us4', '-us5', '-us6', '-us7', '-us8', '-us9'),
        r'\b[0-9a-f]{32}-us\d{1,2}\b',
    ),
    'openai_key': (
        ('sk-',),
        r'\bsk-(?:(?:proj|svcacct|admin|None)-[\w-]{20,}'
        r'|[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}|[A-Za-z0-9]{40,64}\b)',
    ),
    'anthropic_key': (('sk-ant-',), r'\bsk-ant-[\w-]{20,}'),
    'huggingface_token': (('hf_',), r'\bhf_[A-Za-z]{34}\b'),
    'huggingface_organisation': (('api_org_',), r'\bapi_org_[A-Za-z]{34}\b'),
    'replicate_token': (('r8_',), r'\br8_[A-Za-z0-9]{37}\b'),
    'groq_key': (('gsk_',), r'\bgsk_[A-Za-z0-9]{52}\b'),
    'pypi_token': (('pypi-',), r'\bpypi-AgE[\w-]{50,}'),
    'artifactory_token': (
        ('AKCp', 'cmVmdGtu'),
        r'\b(?:AKCp[A-Za-z0-9]{69}|cmVmdGtu[A-Za-z0-9]{56})\b',
    ),
    'npm_token': (('npm_',), r'\bnpm_[A-Za-z0-9]{36}\b'),
    'rubygems_key': (('rubygems_',), r'\brubygems_[0-9a-f]{48}\b'),
    'docker_token': (('dckr_',), r'\bdckr_(?:pat|oat)_[\w-]{27,}'),
    'digitalocean_token': (('dop_v1_', 'doo_v1_', 'dor_v1_'), r'\bdo[opr]_v1_[0-9a-f]{64}\b'),
    'vault_token': (('hvs.', 'hvb.'), r'\bhv[sb]\.[\w-]{24,}'),
    'terraform_token': (('.atlasv1.',), r'\b[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,}'),
    'databricks_token': (('dapi',), r'\bdapi[0-9a-f]{32}(?:-\d)?\b'),
    'newrelic_key': (('NRAK-',), r'\bNRAK-[A-Z0-9]{27}\b'),
    'grafana_token': (('glsa_',), r'\bglsa_[A-Za-z0-9]{32}_[0-9a-fA-F]{8}\b'),
    'linear_key': (('lin_api_',), r'\blin_api_[A-Za-z0-9]{40}\b'),
    'notion_token': (('ntn_',), r'\bntn_[A-Za-z0-9]{40,}'),
    'postman_key': (('PMAK-',), r'\bPMAK-[0-9a-f]{24}-[0-9a-f]{34}\b'),
    'shopify_token': (
        ('shpat_', 'shpca_', 'shppa_', 'shpss_'),
        r'\bshp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}\b',
    ),
    'facebook_token': (('EAA',), r'\bEAA[A-Za-z0-9]{60,}\b'),
    'alibaba_key': (('LTAI',), r'\bLTAI[A-Za-z0-9]{17,21}\b'),
    'tencent_key': (('AKID',), r'\bAKID[A-Za-z0-9]{32}\b'),
    'basic_authorization': (
        ('Basic ',),
        r'''(?i)authorization["\']?\s{0,2}[:=]\s{0,2}["\']?basic ([A-Za-z0-9+/]{8,}={0,2})''',
    ),
    'bearer_authorization': (
        ('earer ',),
        r'''(?i)authorization["\']?\s{0,2}[:=]\s{0,2}["\']?bearer ([\w.~+/-]{16,}={0,2})''',
    ),
}

_NAMES = ('key', 'token', 'secret', 'password', 'passwd', 'passphrase', 'pwd', 'credential')
# Of the many keys, those that open something.
_OPENING = re.compile(
    r'(?i)(?:api|access|auth|private|secret|client|encryption|signing|account|master|session)'
    r'[ _-]?$'
)
_ASSIGNED = (
    r'(?:[sS])?(?![a-z])[\w-]{0,24}["\']?\]?\s{0,4}(?:=>|:=|=|:)\s{0,4}'
    r'(?:["\'`]([^\s"\'`]{8,200})["\'`]|["\'`]?([A-Za-z0-9+/=_!@#%^*~.-]{8,200})(?<!\.))'
)
_LEAST_ENTROPY = 3.0  # bits a character


def secrets(text: str) -> Iterator[Span]:
  """Yields secrets; of a password in an address, the password alone."""
  for literals, form in _compiled():
    if any(literal in text for literal in literals):
      for match in form.finditer(text):
        yield match.span(match.lastindex or 0)
  for name, assignment in _assignments():
    if name in text:
      for match in assignment.finditer(text):
        start = match.start()
        named = name.lower() != 'key' or _OPENING.search(text[max(0, start - 16) : start])
        if named and _random(match[match.lastindex]):
          yield match.span(match.lastindex)


def _random(value: str) -> bool:
  """Whether it looks drawn at random: letters and figures, no call, no variable, much entropy."""
  if not (any(map(str.isdigit, value)) and any(map(str.isalpha, value))):
    return False
  if re.search(r'[(){}<>$\[\];,]|://|^[A-Za-z_]+\.[A-Za-z_]', value):
    return False
  counts = Counter(value).values()
  return -sum(n / len(value) * math.log2(n / len(value)) for n in counts) >= _LEAST_ENTROPY


@functools.cache
def _compiled() -> tuple[tuple[tuple[str, ...], re.Pattern[str]], ...]:
  return tuple((literals, re.compile(form, re.ASCII)) for literals, form in FORMS.values())


@functools.cache
def _assignments() -> tuple[tuple[str, re.Pattern[str]], ...]:
  """Returns a search for each name in each case, since a search for a literal is fast."""
  return tuple(
      (cased, re.compile(cased + _ASSIGNED, re.ASCII))
      for name in _NAMES
      for cased in (name, name.capitalize(), name.upper())
  )
