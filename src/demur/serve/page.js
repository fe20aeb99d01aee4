"use strict";

const at = (id) => document.getElementById(id);

const cell = (text, number = false) => {
  const found = document.createElement("td");
  found.textContent = text;
  if (number) found.className = "number";
  return found;
};

const VERDICTS = {
  harmless: "Harmless",
  refused: "Harmful; the model refuses it",
  jailbreak: "Harmful, and the model does not refuse it",
  "over-refusal": "Harmless, but the model refuses it",
};

function show(found) {
  const score = found.score;
  at("verdict").textContent = (score.flagged ? "Flagged. " : "Not flagged. ") + VERDICTS[score.verdict];
  at("scores").textContent =
    `P(harmful) ${score.harmful.toFixed(3)}, P(the model refuses) ${score.refuse.toFixed(3)}`;
  const tokens = found.tokens.map((token) => {
    const part = document.createElement("span");
    part.textContent = token.text;
    part.title = `harm ${token.harm.toFixed(2)}, refusal ${token.refusal.toFixed(2)}`;
    part.style.background = `rgb(214 96 60 / ${Math.min(1, token.harm) * 0.7})`;
    part.style.borderBottomColor = `rgb(40 110 190 / ${Math.min(1, token.refusal) * 0.9})`;
    return part;
  });
  at("why").hidden = !tokens.length;
  at("tokens").replaceChildren(...tokens);
  const rows = found.features.map((each) => {
    const row = document.createElement("tr");
    row.append(
      cell(each.feature.join(":")), cell(each.role), cell(each.activation.toFixed(2), true), cell(each.adds.toFixed(2), true)
    );
    return row;
  });
  at("features").replaceChildren(...rows);
  at("result").hidden = false;
}

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (at("key").value) headers["X-API-Key"] = at("key").value;
  const reply = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  const found = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(found.error.message), { status: reply.status });
  return found;
}

async function score(event) {
  event?.preventDefault();
  at("state").textContent = "scoring …";
  at("result").hidden = true;
  try {
    show(await ask("v1/explain", { prompt: at("prompt").value }).catch(async (error) => {
      // A guard that was fitted without SAEs explains nothing, but scores.
      if (error.status !== 422) throw error;
      const { results } = await ask("v1/score", { prompts: [at("prompt").value] });
      return { score: results[0], tokens: [], features: [] };
    }));
    at("state").textContent = "";
  } catch (error) {
    at("state").textContent = error.message;
  }
}

at("form").addEventListener("submit", score);
// A prompt after the # is scored at once: it never leaves the browser's address line but in the request.
if (location.hash.length > 1) {
  at("prompt").value = decodeURIComponent(location.hash.slice(1));
  score();
}
