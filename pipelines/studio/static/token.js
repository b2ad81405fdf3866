// The form of /token: exchanges the token, or the link that contains it, for a session.
import { api } from "/static/studio.js";

const form = document.getElementById("token-form");
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = form.elements.token.value.trim();
  const match = text.match(/[?&]token=([^&#\s]+)/);
  try {
    await api("POST", "/token", { token: match ? decodeURIComponent(match[1]) : text });
    location.assign("/");
  } catch (error) {
    const message = document.getElementById("token-error");
    message.textContent = `${error.message[0].toUpperCase()}${error.message.slice(1)}.`;
    message.hidden = false;
    form.elements.token.select();
  }
});
