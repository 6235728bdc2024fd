"`ftlab push` against a stub of the hub: what is sent, what is not, and what nobody should publish"
import json
import pytest, torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
import ftlab.instruments.hub as H
from ftlab import cli
from ftlab.instruments.hub import files_to_send, push
from toys import TOK, toy

class Hub:
    "Remembers what it was asked"
    def __init__(self, there=()):
        self.there, self.asked = set(there), []

    def repo_exists(self, name):
        return name in self.there

    def create_repo(self, name, private):
        self.asked.append(('create', name, private))

    def upload_folder(self, **how):
        self.asked.append(('upload', how['repo_id'], how['folder_path'],
                           tuple(how['allow_patterns'])))
        self.deletes = how['delete_patterns']

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(H, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    toy().save_pretrained(tmp_path/'tuned')
    TOK.save_pretrained(tmp_path/'tuned')
    (tmp_path/'tuned'/'README.md').write_text('a card')
    return tmp_path/'tuned'

def test_a_new_repository(folder):
    hub = Hub()
    found = push(folder, 'ann/talk', private=True, api=hub)
    names = tuple(files_to_send(folder))
    assert hub.asked == [('create', 'ann/talk', True), ('upload', 'ann/talk', str(folder), names)]
    assert found['sent'] and found['bytes'] == sum((folder/n).stat().st_size for n in names)
    assert {'model.safetensors', 'config.json', 'README.md', 'tokenizer.json'} <= set(names)

def test_a_repository_that_exists_is_left_alone_unless_asked(folder):
    hub = Hub(['ann/talk'])
    with pytest.raises(FileExistsError, match='--update'):
        push(folder, 'ann/talk', api=hub)
    assert not hub.asked
    push(folder, 'ann/talk', update=True, api=hub)
    assert [a[0] for a in hub.asked] == ['upload']
    old = ['model.safetensors', 'model-00001-of-00002.safetensors', 'model.safetensors.index.json',
           'adapter_config.json', 'adapter_model.safetensors', 'pytorch_model.bin', 'chat_template.jinja']
    own = ['README.md', 'LICENSE', 'my.txt', 'm.gguf']
    gone = [*filter_repo_objects([*old, *own], allow_patterns=hub.deletes)]
    assert gone == old, 'what would be loaded instead of the new export'
    with pytest.raises(ValueError, match='only a new repository private'):
        push(folder, 'ann/talk', update=True, private=True, api=hub)

STRAY = '''pytorch_model.bin checkpoint.safetensors delta.safetensors train.jsonl run.json log.jsonl rows/a.csv .env
optimizer.pt runs/model.safetensors model_backup/optimizer.safetensors model_my_private_rows.safetensors
data/q.gguf'''.split()

@pytest.mark.parametrize('stray', STRAY)
def test_what_does_not_belong_is_never_sent(folder, stray):
    (folder/stray).parent.mkdir(exist_ok=True)
    (folder/stray).write_text('x')
    hub = Hub()
    with pytest.raises(ValueError, match='does not belong to an exported model'):
        push(folder, 'ann/talk', api=hub)
    assert not hub.asked

def test_a_link_is_not_followed(folder, tmp_path):
    (tmp_path/'secret').write_text('x')
    (folder/'LICENSE').symlink_to(tmp_path/'secret')
    with pytest.raises(ValueError, match='LICENSE'):
        files_to_send(folder)

def test_folders_that_are_no_export(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        push(tmp_path/'x', 'ann/talk')
    (folder/'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='neither config.json'):
        push(folder, 'ann/talk')
    (folder/'config.json').write_text('{}')
    (folder/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no weights'):
        push(folder, 'ann/talk')

def test_broken_files_are_not_sent(folder):
    keep = (folder/'model.safetensors').read_bytes()
    (folder/'model.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match='model.safetensors is not a safetensors file'):
        push(folder, 'ann/talk', dry_run=True)
    save_file({}, folder/'model.safetensors')
    with pytest.raises(ValueError, match='holds no tensor'):
        push(folder, 'ann/talk', dry_run=True)
    (folder/'model.safetensors').write_bytes(keep)
    (folder/'config.json').write_text('')
    with pytest.raises(ValueError, match='config.json cannot be read'):
        push(folder, 'ann/talk', dry_run=True)

@pytest.mark.parametrize('base', ['/home/ann/base', '', None, 'lab-s'])
def test_an_adapter_needs_a_base_that_others_can_load(tmp_path, base):
    (tmp_path/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path=base)))
    save_file(dict(a=torch.ones(1)), tmp_path/'adapter_model.safetensors')
    with pytest.raises(ValueError, match='nobody else can load'):
        files_to_send(tmp_path)
    said = json.dumps(dict(base_model_name_or_path='ann/base'))
    (tmp_path/'adapter_config.json').write_text(said)
    assert files_to_send(tmp_path)

def test_names_tokens_and_the_switch(folder, monkeypatch):
    with pytest.raises(ValueError, match='it must be owner/name'):
        push(folder, 'talk', api=Hub())
    monkeypatch.setattr(H, 'get_token', lambda: None)
    with pytest.raises(PermissionError, match='set HF_TOKEN, or run `hf auth login`'):
        push(folder, 'ann/talk')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ConnectionError, match='HF_HUB_OFFLINE is set'):
        push(folder, 'ann/talk', api=Hub())

def test_the_command(folder, capsys, monkeypatch):
    assert cli.main(['push', str(folder), 'ann/talk', '--dry-run', '--json']) == 0
    said = json.loads(capsys.readouterr().out)
    assert not said['sent'] and said['files']['config.json'] > 0
    hub = Hub()
    monkeypatch.setattr(H, 'get_token', lambda: 't')
    monkeypatch.setattr(H, 'HfApi', lambda: hub)
    assert cli.main(['push', str(folder), 'ann/talk', '--private']) == 0
    assert hub.asked[0] == ('create', 'ann/talk', True)
    assert 'sent to https://huggingface.co/ann/talk' in capsys.readouterr().out
