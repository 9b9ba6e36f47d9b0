"""The page of `pairs_report.py`, as a jinja2 template."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pairs: {{ manifest.name }}</title>
<style>{{ style|safe }}
  .tiles { display: grid; grid-template-columns: repeat(8, 1fr); gap: 10px; margin: 1.2rem 0 }
  .tiles div { background: #f2f4f7; padding: .6rem .7rem } .tiles b { display: block; font-size: 1.3rem }
  .tiles span, .legend { color: #5d6875; font-size: .8rem }
  .stack { display: flex; height: 26px } .legend span { margin-right: 1.1rem; white-space: nowrap }
  .legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -1px }
  .bar { width: 340px } .bar div { height: .8rem } a { color: inherit } .names { color: #0b6e4f }
  .caption { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5; overflow: hidden }
  .caption, .names { overflow-wrap: anywhere } .size { white-space: nowrap; color: #5d6875 }
  .examples { width: 100%; table-layout: fixed; margin-top: 0 } .examples td { vertical-align: top;
    padding: .4rem; overflow-wrap: anywhere }
  .examples img { width: 84px; height: 64px; object-fit: contain; background: #f2f4f7; display: block }
  .examples td.picture { width: 84px }
  .columns { columns: 3; column-gap: 28px; font-size: .85rem }
  .columns div { display: flex; gap: 8px; break-inside: avoid; border-bottom: 1px solid #e6eaef; padding: 1px 4px }
  .columns bdi { flex: 1; min-width: 0 }
  .columns bdi, .heat bdi { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
  .heat { font-size: .72rem } .heat td { padding: 2px; width: 38px; text-align: center; border: 0 }
  .heat th { border: 0; font-weight: 400; padding: 2px 6px; text-align: right } .heat bdi { max-width: 170px }
  .heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left }
  .heat thead bdi { max-width: none; max-height: 130px }
</style>
</head>
<body>
{% macro address(url) %}
{% set shown = (url or "")|truncate(160, true, "…", 0) %}
{% if (url or "").lower().startswith(("http://", "https://")) %}
<a href="{{ url }}" rel="noreferrer noopener nofollow"><bdi>{{ shown }}</bdi></a>
{% else %}<bdi>{{ shown }}</bdi>{% endif %}
{% endmacro %}
<h1>Pairs: {{ manifest.name }}</h1>
<p class="muted"><code>{{ storage }}</code>, config <code>{{ manifest.config_hash }}</code>,
generation {{ manifest.details.generation }}</p>
<div class="tiles">
  <div><b>{{ summary.input|count }}</b><span>rows of input</span></div>
  <div><b class="number">{{ summary.kept|count }}</b><span>kept: {{ summary.kept|percentage(summary.input) }}</span></div>
  <div><b>{{ (summary.input - summary.kept)|count }}</b><span>rejected:
    {{ (summary.input - summary.kept)|percentage(summary.input) }}</span></div>
  <div><b>{{ image_bytes|filesizeformat }}</b><span>of images</span></div>
  <div><b>{{ num_concepts|count }}</b><span>concepts</span></div>
  <div><b>{{ duration }}</b><span>of the last run</span></div>
  <div><b>{{ "{:,.0f}".format(speed) if speed else "–" }}</b><span>rows/s fetched</span></div>
  <div><b>{{ manifest.details.sources|length|count }}</b><span>source{{ "s" if manifest.details.sources|length != 1 }}
    </span></div>
</div>
<div class="stack">
  {% for stage, rows in stages.items() if rows %}
  <div style="flex: {{ rows }}; background: {{ colours[stage] }}" title="{{ stage }}: {{ rows|count }}"></div>
  {% endfor %}
</div>
<p class="legend">
  {% for stage, rows in stages.items() %}
  <span><i style="background: {{ colours[stage] }}"></i>{{ "kept" if stage == "kept" else "rejected: " ~ stage }}:
    {{ rows|count }} ({{ rows|percentage(summary.input) }})</span>
  {% endfor %}
</p>

<h2>Why rows were rejected</h2>
{% if reasons %}
<table>
  <tr><th>stage</th><th>reason</th><th class="n">rows</th><th class="n">of the input</th><th></th></tr>
  {% for stage, reason, rows in reasons %}
  <tr><td>{{ stage }}</td><td><a href="#{{ reason }}">{{ reason }}</a></td><td class="n">{{ rows|count }}</td>
    <td class="n">{{ rows|percentage(summary.input) }}</td><td class="bar"><div style="background: {{ colours[stage] }};
    width: {{ 100 * rows / reasons|map(attribute=2)|max }}%"></div></td></tr>
  {% endfor %}
</table>
{% else %}<p class="muted">No row was rejected.</p>{% endif %}
{% if statuses %}
<p>Of the rows that could not be fetched, by the last HTTP status and by the number of requests:</p>
<div class="row">
  {% for title, entries in [("HTTP status", statuses), ("requests", attempts)] %}
  <table>
    <tr><th class="n">{{ title }}</th><th class="n">rows</th><th class="n">share</th></tr>
    {% for value, rows in entries[:12] %}
    <tr><td class="n">{{ "no answer" if value is none else value }}</td><td class="n">{{ rows|count }}</td>
      <td class="n">{{ rows|percentage(stages.fetch) }}</td></tr>
    {% endfor %}
  </table>
  {% endfor %}
</div>
{% endif %}

<h2>Throughput</h2>
{% if throughput %}<figure class="wide"><img src="{{ throughput }}" alt="rows a second over time"></figure>
{% else %}<p class="muted">Nothing was fetched by the last run.</p>{% endif %}

<h2>Images and captions</h2>
{% if not plots %}<p class="muted">No row was kept.</p>{% endif %}
<div class="row two">
  {% for title, plot in plots.items() %}
  <figure><figcaption>{{ title }}</figcaption><img src="{{ plot }}" alt="{{ title }}"></figure>
  {% endfor %}
  {% if per_image %}
  <figure><figcaption>concepts of a caption</figcaption><img src="{{ per_image }}" alt="concepts of a caption"></figure>
  {% endif %}
</div>

<h2>Kept</h2>
<p class="muted">Rows spread evenly over the table; the names are the concepts of their captions.</p>
<div class="row">
  {% for row in pictures %}
  <figure class="tiny"><img src="{{ row.picture }}" alt="" title="{{ row.url }}"><figcaption>
    <bdi class="caption">{{ row.caption[:most_text] }}</bdi>
    <bdi class="caption names">{{ row.concepts|join(", ") }}</bdi>
    <span class="size">{{ row.width }} x {{ row.height }}</span></figcaption></figure>
  {% endfor %}
</div>

<h2>Rejected</h2>
{% for stage, reason, rows in reasons %}
<h3 id="{{ reason }}"><span style="color: {{ colours[stage] }}">{{ stage }}</span> {{ reason }}
  <span class="muted">{{ rows|count }}</span></h3>
<table class="examples small">
  {% for row in examples[reason] %}
  <tr>
    {% if examples[reason]|selectattr("picture")|list %}
    <td class="picture">{% if row.picture %}<img src="{{ row.picture }}" alt="">{% endif %}</td>
    {% endif %}
    <td><bdi class="caption">{{ row.caption or "" }}</bdi><span class="url muted">{{ address(row.url) }}</span></td>
    {% if row.duplicate_of %}
    <td class="picture">{% if row.survivor %}<img src="{{ row.survivor.picture }}" alt="">{% endif %}</td>
    <td>duplicates row {{ row.duplicate_of.row|count }} of <code>{{ row.duplicate_of.source[:8] }}</code>
      {{- ", which was rejected too" if not row.survivor }}
      {%- if row.detail %} (<bdi>{{ row.detail }}</bdi>){% endif %}
      {% if row.survivor %}<bdi class="caption">{{ row.survivor.caption[:most_text] }}</bdi>
      <span class="url muted">{{ address(row.survivor.url) }}</span>{% endif %}</td>
    {% else %}
    <td><bdi class="caption">{{ row.detail or "" }}</bdi></td>
    {% endif %}
  </tr>
  {% endfor %}
</table>
{% else %}<p class="muted">None.</p>
{% endfor %}

<h2>Concepts</h2>
<p>{{ num_concepts|count }} concepts; {{ covered|count }} images ({{ covered|percentage(summary.kept) }} of those kept)
show at least one of them.
{% if top %}The most frequent ones, with their images:{% endif %}</p>
<div class="columns">
  {% for row in top %}
  {% set filled = 100 * row.image_count / top[0].image_count %}
  <div style="background: linear-gradient(90deg, #d3e8e0 {{ filled }}%, transparent {{ filled }}%)">
    <bdi title="{{ row.name }}">{{ row.name }}</bdi><span>{{ row.image_count|count }}</span></div>
  {% endfor %}
</div>
{% if tail %}
<h3>From frequent to rare</h3>
<figure class="wide"><img src="{{ tail }}" alt="images of each concept, from the most frequent one on"></figure>
{% endif %}
{% for concept, rows in concept_pictures %}
<h3><bdi>{{ concept.name }}</bdi> <span class="muted">{{ concept.image_count|count }} images</span></h3>
<div class="row">
  {% for row in rows %}
  <figure class="tiny"><img src="{{ row.picture }}" alt="">
    <figcaption><bdi class="caption">{{ row.caption[:most_text] }}</bdi></figcaption></figure>
  {% endfor %}
</div>
{% endfor %}
{% if related %}
<h3>Together in one caption</h3>
<p class="muted small">Of the images of the concept on the left, the percentage that also show the one above.</p>
<table class="heat">
  <thead><tr><td></td>{% for one, others in related %}<th title="{{ one.name }}"><bdi>{{ one.name }}</bdi></th>
    {% endfor %}</tr></thead>
  {% for one, others in related %}
  <tr><th title="{{ one.name }}"><bdi>{{ one.name }}</bdi></th>
    {% for other, images, part in others %}
    {% if other is sameas one %}<td style="background: #e6eaef"></td>{% else %}
    <td style="background: rgba(11, 110, 79, {{ "%.3f"|format(0.75 * part ** 0.5) }})"
      title="{{ one.name }} and {{ other.name }}: {{ images|count }} images">
      {{- "%.0f"|format(100 * part) if images }}</td>
    {% endif %}
    {% endfor %}
  </tr>
  {% endfor %}
</table>
{% endif %}

<h2>Sources</h2>
<table>
  <tr><th>digest</th><th class="n">rows</th></tr>
  {% for digest, rows in (manifest.details.sources.items()|list)[:20] %}
  <tr><td><code>{{ digest }}</code></td><td class="n">{{ rows|count }}</td></tr>
  {% endfor %}
</table>
{% if manifest.details.sources|length > 20 %}<p class="muted">and {{ manifest.details.sources|length - 20 }} more</p>
{% endif %}
</body>
</html>
"""
