"""Every kind of secret is found wherever it stands; the examples are drawn at random."""

import random
import string

import pytest

from lm.corpus import privacy
from lm.corpus import privacy_secrets
from lm.corpus.document import Document

RANDOM = random.Random(7)
LETTERS, UPPER, HEX = string.ascii_letters, string.ascii_uppercase, '0123456789abcdef'
MIXED = LETTERS + string.digits


def draw(count, alphabet=MIXED):
  return ''.join(RANDOM.choice(alphabet) for _ in range(count))


def key_block(name):
  body = '\n'.join(draw(64, MIXED + '+/') for _ in range(12))
  return f'-----BEGIN {name}-----\n{body}\n-----END {name}-----'


# kind: examples; what stands before '|', if anything, stays.
EXAMPLES = {
    'private_key': [key_block(f'{name}PRIVATE KEY') for name in ('', 'RSA ', 'EC ', 'OPENSSH ')]
    + [key_block('PGP PRIVATE KEY BLOCK')],
    'putty_key': [f'PuTTY-User-Key-File-2: ssh-rsa\n{draw(64)}\nPrivate-MAC: {draw(40, HEX)}'],
    'age_key': ['AGE-SECRET-KEY-1' + draw(58, UPPER + string.digits)],
    'jwt': [f'eyJ{draw(30)}.eyJ{draw(60)}.{draw(43)}', f'eyJ{draw(30)}.eyJ{draw(60)}'],
    'password_in_url': ['postgres://bob:|' + draw(12), 'redis://:|' + draw(16)],
    'aws_access_key': ['AKIA' + draw(16, UPPER + '234567'), 'ASIA' + draw(16, UPPER + '234567'),
                       'A3TX' + draw(16, UPPER)],
    'google_api_key': ['AIza' + draw(35)],
    'google_oauth': ['ya29.' + draw(60)],
    'google_client_secret': ['GOCSPX-' + draw(28)],
    'azure_storage_key': [f'AccountName=a;AccountKey=|{draw(86)}=='],
    'azure_client_secret': [f'{draw(3)}8Q~{draw(34)}'],
    'azure_sas': [f'https://a.net/b?sv=2020&sig=|{draw(43)}%3D'],
    'github_token': [f'gh{letter}_{draw(36)}' for letter in 'pousr'],
    'github_fine_grained': [f'github_pat_{draw(22)}_{draw(59)}'],
    'gitlab_token': ['glpat-' + draw(20), 'gldt-' + draw(20), 'GR1348941' + draw(20)],
    'bitbucket_token': [f'ATBB{draw(24)}{draw(8, "0123456789ABCDEF")}'],
    'atlassian_token': ['ATATT3' + draw(180) + '=' + draw(8)],
    'slack_token': [f'xoxb-{draw(12, "123")}-{draw(24)}', f'xoxp-{draw(11, "123")}-{draw(32)}'],
    'slack_app_token': [f'xapp-1-A{draw(9, "ABC123")}-{draw(12, "123")}-{draw(64, HEX)}'],
    'slack_webhook': [f'https://|hooks.slack.com/services/T{draw(9)}/B{draw(9)}/{draw(24)}'],
    'discord_webhook': [f'https://|discord.com/api/webhooks/{draw(18, "123")}/{draw(68)}'],
    'discord_token': [f'M{draw(23)}|.{draw(6)}.{draw(27)}'],
    'telegram_token': [f'{draw(9, "123")}:AA{draw(33)}'],
    'stripe_key': ['sk_live_' + draw(24), 'rk_test_' + draw(24)],
    'stripe_webhook': ['whsec_' + draw(32)],
    'square_token': ['sq0atp-' + draw(22)],
    'twilio_key': ['SK' + draw(32, HEX)],
    'sendgrid_key': [f'SG.{draw(22)}.{draw(43)}'],
    'mailgun_key': ['key-' + draw(32, HEX)],
    'mailchimp_key': [draw(32, HEX) + '-us12'],
    'openai_key': ['sk-' + draw(48), 'sk-proj-' + draw(100),
                   f'sk-{draw(20)}T3BlbkFJ{draw(20)}'],
    'anthropic_key': ['sk-ant-api03-' + draw(93)],
    'huggingface_token': ['hf_' + draw(34, LETTERS)],
    'huggingface_organisation': ['api_org_' + draw(34, LETTERS)],
    'replicate_token': ['r8_' + draw(37)],
    'groq_key': ['gsk_' + draw(52)],
    'pypi_token': ['pypi-AgEIcHlwaS5vcmc' + draw(140)],
    'artifactory_token': ['AKCp' + draw(69), 'cmVmdGtu' + draw(56)],
    'npm_token': ['npm_' + draw(36)],
    'rubygems_key': ['rubygems_' + draw(48, HEX)],
    'docker_token': ['dckr_pat_' + draw(27)],
    'digitalocean_token': ['dop_v1_' + draw(64, HEX)],
    'vault_token': ['hvs.' + draw(90)],
    'terraform_token': [f'{draw(14)}.atlasv1.{draw(67)}'],
    'databricks_token': ['dapi' + draw(32, HEX)],
    'newrelic_key': ['NRAK-' + draw(27, UPPER)],
    'grafana_token': [f'glsa_{draw(32)}_{draw(8, HEX)}'],
    'linear_key': ['lin_api_' + draw(40)],
    'notion_token': ['ntn_' + draw(46)],
    'postman_key': [f'PMAK-{draw(24, HEX)}-{draw(34, HEX)}'],
    'shopify_token': ['shpat_' + draw(32, HEX)],
    'facebook_token': ['EAA' + draw(150)],
    'alibaba_key': ['LTAI' + draw(20)],
    'tencent_key': ['AKID' + draw(32)],
    'basic_authorization': [f'Authorization: Basic |{draw(22)}=='],
    'bearer_authorization': [f'"Authorization": "Bearer |{draw(40)}'],
}  # fmt: skip
ASSIGNMENTS = [
    f'aws_secret_access_key = |{draw(40, MIXED + "/+")}', f'"api_key": "|{draw(32, HEX)}',
    f'API-KEY: |{draw(24)}', f"config['secret'] = '|{draw(20)}", f'DB_PASSWORD=|{draw(13)}4',
    f'client_secret: "|{draw(30)}', f'Password: |7{draw(11)}', f'private_token=>|{draw(20)}',
    f'AWS Secret Access Key: |{draw(40)}',
]  # fmt: skip


def redact(text):
  document = Document('a', text)
  privacy.Redact().apply(document)
  return document.text


def test_there_is_an_example_of_every_kind():
  assert set(EXAMPLES) == set(privacy_secrets.FORMS)


@pytest.mark.supports('documents', 'Secrets redacted: keys and tokens of fifty issuers, passwords')
@pytest.mark.parametrize('kind', sorted(EXAMPLES) + ['assignment'])
def test_a_planted_secret_is_found(kind):
  for example in EXAMPLES.get(kind, ASSIGNMENTS):
    before, _, secret = example.rpartition('|')
    after = '@db.example.com/x' if kind == 'password_in_url' else ''
    for text in ('We use {} for this.\n', 'x = "{}"\n', '{}', '密钥{}。', '<code>{}</code>'):
      planted = text.format(before + secret + after)
      assert redact(planted) == text.format(before + '<SECRET>' + after), planted


@pytest.mark.parametrize('text', [
    'AKIAshort', 'sk-learn and sk-' + 'a' * 10, 'the hf_hub_download function', 'ghp_short',
    'key-value-store', 'https://example.com:8080/a@b', '-----BEGIN PUBLIC KEY-----',
    'password = "correct horse battery"', 'token: <your token>', 'max_tokens = 1234567890',
    'api_key=xxxxxxxxxxxxxxxx1', 'keyboard: QWERTY12345', 'Basic education', 'tokenizer: bert2bert9'
])  # fmt: skip
def test_what_only_looks_like_a_secret_is_left(text):
  assert redact(text) == text
