// Small things that the browser keeps: `lasting` ones, and `passing` ones that end with the tab. Where storage is blocked or
// full, nothing is kept and nothing fails.

function guarded(storage) {
  const attempt = (action, otherwise) => {
    try {
      return action(storage());
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      return otherwise;
    }
  };
  return {
    get: (name) => attempt((place) => place.getItem(name), null),
    set: (name, value) => attempt((place) => place.setItem(name, value)),
    remove: (name) => attempt((place) => place.removeItem(name)),
  };
}

export const lasting = guarded(() => localStorage);
export const passing = guarded(() => sessionStorage);
